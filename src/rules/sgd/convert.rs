//! Conversions to another form with the same trajectory, at constant learning rate and momentum.

use super::{MomentumForm, SgdConfig};
use crate::rules::Real;

/// A configuration of another form that visits the same points, and what becomes of a velocity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FormConversion {
    /// The configuration.
    pub config: SgdConfig,
    /// The factor by which a saved velocity has to be multiplied.
    pub velocity_scale: f64,
}

/// No exact conversion between two forms.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("no exact conversion from the {from} form to the {to} form: {why}")]
pub struct FormConversionError {
    /// The form of the configuration.
    pub from: MomentumForm,
    /// The form that was asked for.
    pub to: MomentumForm,
    /// The reason.
    pub why: &'static str,
}

impl SgdConfig {
    /// The configuration of another form that visits the same points from the same start, as long as learning
    /// rate and momentum stay constant.
    ///
    /// Two forms agree when `alpha`, `b` and the product `a*c` of their
    /// [`Coefficients`](crate::rules::sgd::Coefficients) agree; the velocities differ by the factor between their `c`.
    /// From the heavy ball with `eta` and `mu`:
    ///
    /// | to | lr | momentum | velocity times |
    /// |---|---|---|---|
    /// | EMA | `eta/(1-mu)` | `mu` | `1-mu` |
    /// | lr inside | `eta` | `mu` | `-eta` |
    /// | particle | `eta` | `mu` | `-eta/dt` |
    ///
    /// `time_step` is that of the particle form, and ignored by the others.
    ///
    /// ```
    /// use wgpu_optim::rules::sgd::MomentumForm;
    /// use wgpu_optim::SgdConfig;
    ///
    /// let heavy_ball = SgdConfig::builder(0.1).momentum(0.75).build()?;
    /// let averaged = heavy_ball.convert(MomentumForm::Ema, 1.0)?;
    /// assert_eq!(averaged.config.lr(), 0.4);
    /// assert_eq!(averaged.velocity_scale, 0.25);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`FormConversionError`] where no exact conversion exists: dampening, whose first step is an exception; Nesterov
    /// momentum to a form that does not define it; a heavy ball without friction (`mu = 1`) to EMA; a learning
    /// rate of zero, which an lr-inside velocity cannot be scaled back from.
    pub fn convert(
        &self,
        to: MomentumForm,
        time_step: f64,
    ) -> Result<FormConversion, FormConversionError> {
        let refuse = |why| FormConversionError {
            from: self.form(),
            to,
            why,
        };
        if self.dampening() != 0.0 {
            return Err(refuse("a dampened velocity starts with an undampened step"));
        }
        if to == MomentumForm::Ema && self.momentum() == 1.0 {
            return Err(refuse("at momentum 1 an average never takes in a gradient"));
        }
        // Over the heavy ball: what each form multiplies its learning rate and velocity by.
        let (mu, dt) = (self.momentum(), time_step);
        let eta = match self.form() {
            MomentumForm::Ema => self.lr() * (1.0 - mu),
            _ => self.lr(),
        };
        let velocity_over_heavy_ball = |form, dt: f64| match form {
            MomentumForm::HeavyBall => 1.0,
            MomentumForm::Ema => 1.0 - mu,
            MomentumForm::LrInside => -eta,
            MomentumForm::Particle => -eta / dt,
        };
        let lr = match to {
            MomentumForm::Ema => eta / (1.0 - mu),
            _ => eta,
        };
        if f32::from_f64(self.lr()) == 0.0 || f32::from_f64(lr) == 0.0 {
            return Err(refuse(
                "at a learning rate of zero the velocities have no fixed ratio",
            ));
        }
        let config = Self::builder(lr)
            .momentum(mu)
            .nesterov(self.nesterov())
            .coupled_weight_decay(self.coupled_weight_decay())
            // The decay multiplies by lr*lambda_d, and the lr may be another one.
            .decoupled_weight_decay(self.decoupled_weight_decay() * self.lr() / lr)
            .maximize(self.maximize())
            .form(to)
            .time_step(if to == MomentumForm::Particle {
                dt
            } else {
                1.0
            })
            .build()
            .map_err(|_| refuse("the form does not define such a configuration"))?;
        Ok(FormConversion {
            config,
            velocity_scale: velocity_over_heavy_ball(to, dt)
                / velocity_over_heavy_ball(self.form(), self.time_step()),
        })
    }
}
