// How the scalars of a step arrive on devices with immediates.
var<immediate> k: Uniforms;
