//! The data: red wines by what a laboratory measured of them, and the score that tasters gave (Cortez et al., *Modeling
//! wine preferences by data mining from physicochemical properties*, 2009; 1599 wines, 11 measures).

use fastrand::Rng;

/// The share of rows that is held out: one in so many.
const HELD_OUT: usize = 5;
/// The seed of the split, which is the same for all runs.
const SPLIT_SEED: u64 = 2009;

/// Rows of features and, in the last column, what is to be predicted; each column has mean 0 and variance 1 over the
/// rows to train on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Numbers in a row.
    pub columns: usize,
    /// The number of rows to train on, which come first. The others are held out.
    pub train_rows: usize,
    /// Row by row.
    pub values: Vec<f32>,
}

impl Dataset {
    /// The wines.
    #[must_use]
    pub fn wines() -> Self {
        let wines = linfa_datasets::winequality();
        let scores = wines.targets().iter();
        let mut rows: Vec<Vec<f64>> = wines
            .records()
            .rows()
            .into_iter()
            .zip(scores)
            .map(|(measures, score)| measures.iter().copied().chain([*score as f64]).collect())
            .collect();
        Rng::with_seed(SPLIT_SEED).shuffle(&mut rows);
        let train_rows = rows.len() - rows.len() / HELD_OUT;
        Self::standardized(&rows, train_rows)
    }

    /// A dataset of these rows, of which the first are to train on: means and variances are theirs alone.
    #[must_use]
    pub fn standardized(rows: &[Vec<f64>], train_rows: usize) -> Self {
        let columns = rows.first().map_or(0, Vec::len);
        let mut values = vec![0.0; rows.len() * columns];
        for column in 0..columns {
            let of_training = rows[..train_rows].iter().map(|row| row[column]);
            let mean = of_training.clone().sum::<f64>() / train_rows as f64;
            let variance = of_training.map(|x| (x - mean).powi(2)).sum::<f64>() / train_rows as f64;
            // A column that says nothing stays at zero.
            let deviation = if variance > 0.0 { variance.sqrt() } else { 1.0 };
            for (value, row) in values.iter_mut().skip(column).step_by(columns).zip(rows) {
                *value = ((row[column] - mean) / deviation) as f32;
            }
        }
        Self {
            columns,
            train_rows,
            values,
        }
    }

    /// Numbers that a prediction is made from.
    #[must_use]
    pub const fn features(&self) -> usize {
        self.columns - 1
    }

    /// The number of rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    /// The values of a row.
    #[must_use]
    pub fn row(&self, row: u32) -> &[f32] {
        &self.values[row as usize * self.columns..][..self.columns]
    }
}
