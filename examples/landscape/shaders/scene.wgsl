// Terrain and balls in perspective. Stands behind terrain.wgsl. Colours are as displays take them (sRGB), not linear.

struct View {
    // From the drawn cube, x and y in [-1, 1] and z up, to clip space.
    projection: mat4x4<f32>,
    // Red, green, blue, and how much a ball covers what is behind it.
    ball_colour: vec4<f32>,
    // In pixels.
    viewport: vec2<f32>,
    ball_radius: f32,
}

@group(0) @binding(0) var<uniform> view: View;

const CELLS = 192u;
const RELIEF = 0.55;
const LEVELS = 20.0;

// The height's share of what is drawn, low ones exaggerated where the terrain is steep.
fn shown(height: f32) -> f32 {
    let share = (height - LOWEST) / (HIGHEST - LOWEST);
    return pow(clamp(share, 1e-6, 1.0), EXAGGERATION);
}

// How fast that grows with the height.
fn shown_slope(height: f32) -> f32 {
    let share = clamp((height - LOWEST) / (HIGHEST - LOWEST), 1e-3, 1.0);
    return EXAGGERATION * pow(share, EXAGGERATION - 1.0) / (HIGHEST - LOWEST);
}

struct Surface {
    @builtin(position) position: vec4<f32>,
    @location(0) at: vec2<f32>,
}

// A strip of triangles for each row.
@vertex
fn surface_vertex(@builtin(vertex_index) vertex: u32, @builtin(instance_index) row: u32) -> Surface {
    let cell = vec2(f32(vertex / 2u), f32(row + vertex % 2u));
    let at = 2.0 * cell / f32(CELLS) - 1.0;
    let height = ground(CENTRE + HALF_WIDTH * at).height;
    return Surface(view.projection * vec4(at, RELIEF * shown(height), 1.0), at);
}

fn hypsometric(share: f32) -> vec3<f32> {
    let deep = vec3(0.10, 0.14, 0.24);
    let middle = vec3(0.36, 0.47, 0.47);
    let high = vec3(0.90, 0.88, 0.80);
    if share < 0.45 {
        return mix(deep, middle, share / 0.45);
    }
    return mix(middle, high, (share - 0.45) / 0.55);
}

@fragment
fn surface_fragment(surface: Surface) -> @location(0) vec4<f32> {
    let p = CENTRE + HALF_WIDTH * surface.at;
    let here = ground(p);
    let share = shown(here.height);
    let incline = RELIEF * shown_slope(here.height) * HALF_WIDTH * here.slope;
    let normal = normalize(vec3(-incline, 1.0));
    let light = clamp(dot(normal, normalize(vec3(-0.55, 0.35, 0.75))), 0.0, 1.0);
    var colour = hypsometric(share) * (0.42 + 0.75 * light);

    // Contour lines of one width, thinner where they would run together.
    let level = share * LEVELS;
    let width = fwidth(level);
    let from_line = abs(fract(level + 0.5) - 0.5) / max(width, 1e-6);
    let line = (1.0 - smoothstep(0.3, 1.1, from_line)) * (1.0 - smoothstep(0.2, 0.7, width));
    colour = mix(colour, vec3(0.05, 0.07, 0.10), 0.45 * line);

    // A white ring around each deepest valley.
    var deepest = DEEPEST;
    for (var i = 0u; i < DEEPEST_COUNT; i++) {
        let d = p - deepest[i];
        let from_ring = abs(length(d) - sqrt(VALLEY_RADIUS_SQUARED)) / max(fwidth(length(d)), 1e-6);
        colour = mix(colour, vec3(1.0), 0.9 * (1.0 - smoothstep(0.5, 1.6, from_ring)));
    }

    // The terrain's edge ends softly.
    let inside = (1.0 - abs(surface.at)) / max(fwidth(surface.at), vec2(1e-6));
    return vec4(colour, clamp(min(inside.x, inside.y), 0.0, 1.0));
}

// A ball a little above the ground, or nowhere if it has left the terrain.
fn place(position: vec2<f32>) -> vec4<f32> {
    let at = (position - CENTRE) / HALF_WIDTH;
    if !(max(abs(at.x), abs(at.y)) <= 1.0) {
        return vec4(2.0, 2.0, 2.0, 1.0);
    }
    return view.projection * vec4(at, RELIEF * shown(ground(position).height) + 0.012, 1.0);
}

struct Ball {
    @builtin(position) position: vec4<f32>,
    @location(0) in_disc: vec2<f32>,
}

@vertex
fn point_vertex(@location(0) position: vec2<f32>) -> Ball {
    return Ball(place(position), vec2(0.0));
}

@vertex
fn disc_vertex(@builtin(vertex_index) corner: u32, @location(0) position: vec2<f32>) -> Ball {
    let in_disc = 2.0 * vec2(f32(corner % 2u), f32(corner / 2u)) - 1.0;
    var centre = place(position);
    centre += vec4(2.0 * view.ball_radius * in_disc / view.viewport * centre.w, 0.0, 0.0);
    return Ball(centre, in_disc);
}

@fragment
fn point_fragment(ball: Ball) -> @location(0) vec4<f32> {
    return view.ball_colour;
}

// Lit from above left, with a dark rim that ends softly.
@fragment
fn disc_fragment(ball: Ball) -> @location(0) vec4<f32> {
    let radius = length(ball.in_disc);
    let pixel = fwidth(radius);
    if radius > 1.0 {
        discard;
    }
    let light = 1.0 - 0.35 * length(ball.in_disc - vec2(-0.3, 0.3));
    let rim = smoothstep(0.65, 1.0, radius);
    return vec4(mix(view.ball_colour.rgb * light, vec3(0.04), 0.8 * rim), clamp((1.0 - radius) / max(pixel, 1e-6), 0.0, 1.0));
}
