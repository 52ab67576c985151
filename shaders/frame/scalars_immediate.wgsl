// How the scalars of a step arrive on devices with immediates.
var<immediate> wo_k: wo_Uniforms;
