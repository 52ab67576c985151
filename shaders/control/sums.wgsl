// Sums of squares in which nothing overflows or vanishes: three of them, for magnitudes below 2^-60, from 2^44 on, and
// between (Blue, "A Portable Fortran Program to Find the Euclidean Norm of a Vector", ACM TOMS 4(1), 1978). The small
// are scaled by 2^90 and the large by 2^-84 before they are squared, so 2^36 squares of each have room.

struct Sums {
    middle: vec4<f32>,
    small: vec4<f32>,
    large: vec4<f32>,
    // The largest magnitude, as its bits: those of infinity and NaN exceed all others.
    top: vec4<u32>,
}

// The least that is not small, and the least that is large.
const MIDDLE: u32 = 0x21800000u;
const LARGE: u32 = 0x55800000u;

// Adds the squares of four f32, given as bits: no device then flushes what is subnormal.
fn add_squares(sums: ptr<function, Sums>, bits: vec4<u32>) {
    let magnitude = bits & vec4(0x7fffffffu);
    let is_small = magnitude < vec4(MIDDLE);
    let is_large = magnitude >= vec4(LARGE);
    let up = select(vec4(1.0), vec4(0x1p+90f), is_small);
    let scale = select(up, vec4(0x1p-84f), is_large);
    // A subnormal is so many 2^-149.
    let subnormal = vec4<f32>(magnitude) * 0x1p-59f;
    let value = select(bitcast<vec4<f32>>(magnitude) * scale, subnormal, magnitude < vec4(0x00800000u));
    let square = value * value;
    let zero = vec4<f32>();
    (*sums).middle += select(square, zero, is_small | is_large);
    (*sums).small += select(zero, square, is_small);
    (*sums).large += select(zero, square, is_large);
    (*sums).top = max((*sums).top, magnitude);
}
