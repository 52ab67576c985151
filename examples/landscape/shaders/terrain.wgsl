// The terrains of src/terrain.rs, statement by statement. Numbers that belong to a terrain stand before this file.

struct Ground {
    height: f32,
    slope: vec2<f32>,
}

fn ground(p: vec2<f32>) -> Ground {
    let x = p.x;
    let y = p.y;
    switch TERRAIN {
        case 0u: {
            return Ground(0.5 * (x * x + 25.0 * y * y), vec2(x, 25.0 * y));
        }
        case 1u: {
            let left = 1.0 - x;
            let above = y - x * x;
            return Ground(
                left * left + 100.0 * above * above,
                vec2(-2.0 * left - 400.0 * x * above, 200.0 * above),
            );
        }
        case 2u: {
            let a = x * x + y - 11.0;
            let b = x + y * y - 7.0;
            return Ground(a * a + b * b, vec2(4.0 * x * a + 2.0 * b, 2.0 * a + 4.0 * y * b));
        }
        case 3u: {
            return hills(p);
        }
        case 4u: {
            return Ground(0.5 * (x * x - y * y) + 0.25 * y * y * y * y, vec2(x, y * y * y - y));
        }
        default: {
            return fractal(p);
        }
    }
}

fn hills(p: vec2<f32>) -> Ground {
    var hills = HILLS;
    var height = 0.12 * (p.x * p.x + p.y * p.y);
    var slope = 0.24 * p;
    for (var i = 0u; i < 15u; i++) {
        let hill = hills[i];
        let d = p - hill.yz;
        let narrow = 1.0 / (hill.w * hill.w);
        let q = 1.0 / (1.0 + (d.x * d.x + d.y * d.y) * narrow);
        height += hill.x * q * q;
        slope += -4.0 * hill.x * q * q * q * narrow * d;
    }
    return Ground(height, slope);
}

fn fractal(p: vec2<f32>) -> Ground {
    var octaves = OCTAVES;
    var height = 0.15 * (p.x * p.x + p.y * p.y);
    var slope = 0.3 * p;
    var depth = 0.6;
    var frequency = 0.25;
    for (var i = 0u; i < 5u; i++) {
        let octave = octaves[i];
        let u = pit(frequency * (octave.x * p.x - octave.y * p.y) + octave.z);
        let v = pit(frequency * (octave.y * p.x + octave.x * p.y) + octave.w);
        height -= depth * u.x * v.x;
        let along_u = depth * frequency * u.y * v.x;
        let along_v = depth * frequency * u.x * v.y;
        slope -= vec2(
            octave.x * along_u + octave.y * along_v,
            octave.x * along_v - octave.y * along_u,
        );
        depth *= 0.5;
        frequency *= 2.0;
    }
    return Ground(height, slope);
}

// A smooth wave of period 1 and its slope.
fn pit(at: f32) -> vec2<f32> {
    let t = at - floor(at);
    let both = t * (1.0 - t);
    return vec2(16.0 * both * both, 32.0 * both * (1.0 - 2.0 * t));
}
