// The picture into the engine's pass, over its viewport.

@group(0) @binding(0) var picture: texture_2d<f32>;
@group(0) @binding(1) var nearest: sampler;

// Whether the engine's texture takes linear light.
override IS_LINEAR: bool;

struct Corner {
    @builtin(position) position: vec4<f32>,
    @location(0) at: vec2<f32>,
}

// One triangle that covers all.
@vertex
fn paint_vertex(@builtin(vertex_index) vertex: u32) -> Corner {
    let at = vec2(f32((vertex << 1u) & 2u), f32(vertex & 2u));
    return Corner(vec4(2.0 * at.x - 1.0, 1.0 - 2.0 * at.y, 0.0, 1.0), at);
}

@fragment
fn paint_fragment(corner: Corner) -> @location(0) vec4<f32> {
    let colour = textureSample(picture, nearest, corner.at);
    if IS_LINEAR {
        let low = colour.rgb / 12.92;
        let high = pow((colour.rgb + 0.055) / 1.055, vec3(2.4));
        return vec4(select(high, low, colour.rgb <= vec3(0.04045)), 1.0);
    }
    return colour;
}
