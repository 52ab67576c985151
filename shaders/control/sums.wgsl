// Sums of squares in which nothing overflows or vanishes: three of them, for magnitudes below 2^-60, from 2^44 on, and
// between (Blue, "A Portable Fortran Program to Find the Euclidean Norm of a Vector", ACM TOMS 4(1), 1978). The small
// are scaled by 2^90 and the large by 2^-84 before they are squared, so 2^36 squares of each have room.

struct Sums {
    middle: vec4<f32>,
    small: vec4<f32>,
    large: vec4<f32>,
    // The largest magnitude, as its bits: those of infinity and NaN exceed all others.
    top: vec4<i32>,
}

// The least that is not small, and the least that is large.
const MIDDLE: i32 = 0x21800000;
const LARGE: i32 = 0x55800000;

// Magnitudes as bits, which are in the order of what they stand for and below 2^31.
fn magnitude_of(bits: vec4<u32>) -> vec4<i32> {
    return bitcast<vec4<i32>>(bits & vec4(0x7fffffffu));
}

// Adds squares as if all were between: all that most gradients need.
fn add_middle(sums: ptr<function, Sums>, magnitude: vec4<i32>) {
    let value = bitcast<vec4<f32>>(magnitude);
    (*sums).middle += value * value;
    (*sums).top = max((*sums).top, magnitude);
}

// Those of four vec4: what goes into the sum at once, so that it is rounded less often.
fn add_four_middle(
    sums: ptr<function, Sums>,
    first: vec4<i32>,
    second: vec4<i32>,
    third: vec4<i32>,
    fourth: vec4<i32>,
) {
    let a = bitcast<vec4<f32>>(first);
    let b = bitcast<vec4<f32>>(second);
    let c = bitcast<vec4<f32>>(third);
    let d = bitcast<vec4<f32>>(fourth);
    (*sums).middle += (a * a + b * b) + (c * c + d * d);
    (*sums).top = max((*sums).top, max(max(first, second), max(third, fourth)));
}

// Whether that was wrong: what is large may have overflowed, and what is small vanished. Where the sum is at least 2^-58,
// 2^24 squares below 2^-120 are nothing beside it.
fn is_beyond_middle(sums: Sums) -> bool {
    let top = max(max(sums.top.x, sums.top.y), max(sums.top.z, sums.top.w));
    return top >= LARGE || (top > 0 && sum(sums.middle) < 0x1p-58f);
}

// Adds squares of any magnitude. Bits of f32 are scaled where they are, so that no device flushes what is subnormal.
fn add_any(sums: ptr<function, Sums>, magnitude: vec4<i32>) {
    let is_small = magnitude < vec4(MIDDLE);
    let is_large = magnitude >= vec4(LARGE);
    let up = select(vec4(1.0), vec4(0x1p+90f), is_small);
    let scale = select(up, vec4(0x1p-84f), is_large);
    // A subnormal is so many 2^-149.
    let subnormal = vec4<f32>(magnitude) * 0x1p-59f;
    let value = select(bitcast<vec4<f32>>(magnitude) * scale, subnormal, magnitude < vec4(0x00800000));
    let square = value * value;
    let zero = vec4<f32>();
    (*sums).middle += select(square, zero, is_small | is_large);
    (*sums).small += select(zero, square, is_small);
    (*sums).large += select(zero, square, is_large);
    (*sums).top = max((*sums).top, magnitude);
}

fn sum(values: vec4<f32>) -> f32 {
    return (values.x + values.y) + (values.z + values.w);
}
