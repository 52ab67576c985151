// How the scalars of a dispatch arrive.
//# if IMMEDIATES
var<immediate> wo_k: wo_Uniforms;
//# else
@group(1) @binding(0) var<uniform> wo_k: wo_Uniforms;
//# end
