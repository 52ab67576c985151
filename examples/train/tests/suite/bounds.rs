//! The network in `f64`, and with it a range for every value of an `f32` computation: the library's running error
//! analysis, over parameters that may be ranges themselves.

use train::model::Layer;
use train::task::{Batch, Task};
use wgpu_optim::oracle::{Arithmetic, Bounded};

/// A loss and its gradients, in the model's order.
pub struct Gradients {
    pub loss: Bounded,
    pub grads: Vec<Vec<Bounded>>,
}

pub fn exactly(params: &[Vec<f32>]) -> Vec<Vec<Bounded>> {
    let tensors = params.iter();
    tensors
        .map(|values| values.iter().map(|x| Bounded::exactly(*x)).collect())
        .collect()
}

/// The ranges of a batch's gradients: layer by layer as in a textbook, and every sum in whatever order.
pub fn gradients(
    task: &Task,
    order: &[u32],
    params: &[Vec<Bounded>],
    batch: Batch,
    at: Arithmetic,
) -> Gradients {
    let one = Bounded::exactly(1.0);
    let layers = &task.model.layers;
    let rows: Vec<_> = order[batch.first as usize..][..batch.rows as usize]
        .iter()
        .map(|row| task.data.row(*row))
        .collect();
    let features = |row: &&[f32]| row[..task.data.features()].to_vec();
    let features: Vec<_> = rows.iter().map(features).collect();
    // By layer what comes in, row by row; behind the last the predictions.
    let mut values = vec![exactly(&features)];
    for (index, Layer { outputs, .. }) in layers.iter().enumerate() {
        let (weight, bias) = (&params[2 * index], &params[2 * index + 1]);
        let unit = |row: &Vec<Bounded>, unit: usize| {
            let weights = weight.iter().skip(unit).step_by(*outputs);
            let products = row.iter().zip(weights).map(|(x, w)| at.product(*x, *w));
            let z = at.sum(products.chain([bias[unit]]).collect::<Vec<_>>());
            if index + 1 == layers.len() {
                z
            } else {
                at.quotient(z, at.sum([one, z.magnitude()]))
            }
        };
        let layer = |row| (0..*outputs).map(|u| unit(row, u)).collect();
        values.push(values[index].iter().map(layer).collect());
    }

    let weight = at.scalar(2.0 / f64::from(batch.rows));
    let errors = values[layers.len()].iter().zip(&rows).map(|(out, row)| {
        let target = Bounded::exactly(row[task.data.features()]);
        at.difference(out[0], target)
    });
    let errors: Vec<_> = errors.collect();
    let squares: Vec<_> = errors.iter().map(|e| at.product(*e, *e)).collect();
    let loss = at.quotient(at.sum(squares), Bounded::exactly(batch.rows as f32));

    let delta = |error: &Bounded| vec![at.product(weight, *error)];
    let mut deltas: Vec<Vec<_>> = errors.iter().map(delta).collect();
    let mut grads = vec![Vec::new(); params.len()];
    for (index, Layer { inputs, outputs }) in layers.iter().enumerate().rev() {
        let over_rows =
            |term: &dyn Fn(usize) -> Bounded| at.sum((0..rows.len()).map(term).collect::<Vec<_>>());
        let input = &values[index];
        grads[2 * index] = (0..inputs * outputs)
            .map(|w| {
                over_rows(&|row| at.product(input[row][w / outputs], deltas[row][w % outputs]))
            })
            .collect();
        grads[2 * index + 1] = (0..*outputs)
            .map(|unit| over_rows(&|row| deltas[row][unit]))
            .collect();
        if index == 0 {
            break;
        }
        let below = |row: usize, i: usize| {
            let weights = &params[2 * index][i * outputs..][..*outputs];
            let products = weights.iter().zip(&deltas[row]);
            let sum = at.sum(
                products
                    .map(|(w, d)| at.product(*w, *d))
                    .collect::<Vec<_>>(),
            );
            let rest = at.difference(one, input[row][i].magnitude());
            at.product(sum, at.product(rest, rest))
        };
        let below = |row| (0..*inputs).map(|i| below(row, i)).collect();
        deltas = (0..rows.len()).map(below).collect();
    }
    Gradients { loss, grads }
}

/// The number of values that are out of their ranges.
pub fn outside<'b>(
    values: impl IntoIterator<Item = &'b f32>,
    ranges: impl IntoIterator<Item = &'b Bounded>,
) -> usize {
    let outside = |(value, range): &(&f32, &Bounded)| {
        let value = f64::from(**value);
        !(range.low <= value && value <= range.high)
    };
    values.into_iter().zip(ranges).filter(outside).count()
}

/// The widest range.
pub fn widest<'b>(ranges: impl IntoIterator<Item = &'b Bounded>) -> f64 {
    let widths = ranges.into_iter().map(|range| range.high - range.low);
    widths.fold(0.0, f64::max)
}
