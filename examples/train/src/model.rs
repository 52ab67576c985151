//! The network: dense layers, softsign between them, one output. `model.wgsl` and `cpu.rs` compute it.

use fastrand::Rng;

/// `outputs` units, each of which weighs all `inputs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Width of what comes in.
    pub inputs: usize,
    /// Width of what goes out.
    pub outputs: usize,
}

/// Layers, each the input of the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The layers from the data to the prediction.
    pub layers: Vec<Layer>,
}

impl Model {
    /// A model from so many features through hidden layers of these widths to one number.
    #[must_use]
    pub fn new(features: usize, hidden: &[usize]) -> Self {
        let outputs = hidden.iter().copied().chain([1]);
        let mut inputs = features;
        let layer = |outputs| {
            let layer = Layer { inputs, outputs };
            inputs = outputs;
            layer
        };
        Self {
            layers: outputs.map(layer).collect(),
        }
    }

    /// Names and shapes of the parameters, weight and bias of each layer in turn.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let layers = (1..).zip(&self.layers);
        layers
            .flat_map(|(number, layer)| {
                [
                    (
                        format!("layer{number}.weight"),
                        vec![layer.inputs, layer.outputs],
                    ),
                    (format!("layer{number}.bias"), vec![layer.outputs]),
                ]
            })
            .collect()
    }

    /// Random parameters to start from, in the order of [`tensors`](Self::tensors): weights of variance `1/inputs`
    /// (LeCun et al., *Efficient BackProp*, 1998), biases zero.
    #[must_use]
    pub fn init(&self, rng: &mut Rng) -> Vec<Vec<f32>> {
        let layers = self.layers.iter();
        layers
            .flat_map(|layer| {
                let reach = (3.0 / layer.inputs as f32).sqrt();
                let weight = (0..layer.inputs * layer.outputs)
                    .map(|_| reach * (2.0 * rng.f32() - 1.0))
                    .collect();
                [weight, vec![0.0; layer.outputs]]
            })
            .collect()
    }

    /// The number of parameters.
    #[must_use]
    pub fn numel(&self) -> usize {
        let layers = self.layers.iter();
        layers.map(|layer| (layer.inputs + 1) * layer.outputs).sum()
    }
}
