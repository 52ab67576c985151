// How the scalars of a step arrive on devices without immediates.
@group(1) @binding(0) var<uniform> wo_k: wo_Uniforms;
