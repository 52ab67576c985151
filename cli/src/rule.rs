//! The choice of an update rule, as it is typed: a name, the library whose version and defaults it has, and the fields
//! that differ. No rule is known here; the names come from the library's presets, and the flags that a rule takes from
//! its fields.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Args as ClapArgs;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use serde_json::{Map, Value};
use wgpu_optim::rules::RulePreset;
use wgpu_optim::{AnyRule, Rule as _};

/// The rule of those who name none.
const DEFAULT: &str = "sgd";

const HEADING: &str = "Hyper-parameters";

/// The field that says which rule it is.
const RULE: &str = "rule";

/// The field that `--lr` sets.
const LR: &str = "lr";

/// The two fields of which `--weight-decay` sets one.
const COUPLED: &str = "weight_decay";
const DECOUPLED: &str = "decoupled_weight_decay";

/// A rule as it is typed.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct RuleArgs {
    /// Update rule
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(names()))]
    pub rule: Option<String>,
    /// Form of the rule, where it has several, in place of a preset's: of sgd, for one, heavy-ball, ema, lr-inside or
    /// particle
    #[arg(long, value_name = "FORM", conflicts_with = "preset", help_heading = HEADING)]
    pub form: Option<String>,
    /// The hyper-parameters that differ from the preset's.
    #[command(flatten)]
    pub fields: FieldArgs,
}

impl RuleArgs {
    /// The rule with all its fields, checked.
    pub fn config(&self) -> Result<AnyRule> {
        let rule = self.rule.as_deref().unwrap_or(DEFAULT);
        self.fields.config(rule, self.form.as_deref())
    }

    /// The rule of a run that goes on from what `saved` was made with, or starts with `start`, and what was typed in place
    /// of it: fields that were not are those of the state where the rule is the state's, else those of `start` where no
    /// rule was typed, else the preset's.
    pub fn resumed(&self, saved: Option<&AnyRule>, start: Option<&AnyRule>) -> Result<Resumed> {
        let name = self.rule.as_deref();
        let is_named = self.fields.preset.is_some() || name.is_some();
        let base = match (saved, start) {
            (Some(saved), _) if self.is_rule_of(saved)? => Some(saved),
            (None, Some(start)) if !is_named && self.form.is_none() => Some(start),
            _ => None,
        };
        let Some(base) = base else {
            ensure!(
                self.fields.has_lr(),
                "expected --lr, the learning rate{}",
                match saved {
                    Some(saved) => format!(
                        ": the state was made by the rule {}, whose own is no other rule's",
                        name_of(&fields_of(saved)?)
                    ),
                    None => ": there is no state to have it from".to_owned(),
                }
            );
            return Ok(Resumed {
                config: self.config()?,
                typed: self.name(),
                from_state: Map::new(),
                from_start: Map::new(),
            });
        };
        let fields = fields_of(base)?;
        let rule = name.unwrap_or_else(|| name_of(&fields)).to_owned();
        let config = self
            .fields
            .in_place_of(base, self.form.as_deref())
            .with_context(|| match saved {
                Some(_) => format!("the state was made by the rule {}", name_of(&fields)),
                None => format!("without --rule it starts from {}", in_words(&fields)),
            })?;
        let now = fields_of(&config)?;
        let is_typed = |field: &str| {
            let mut given = self.fields.fields_set();
            given.any(|other| other == field) || (field == "form" && self.form.is_some())
        };
        let kept = fields.iter().filter(|(field, value)| {
            *field != RULE && now.get(*field) == Some(value) && !is_typed(field)
        });
        let kept = kept.map(|(field, value)| (field.clone(), value.clone()));
        let (mut from_state, mut from_start) = (Map::new(), Map::new());
        match saved {
            Some(_) => from_state.extend(kept),
            None => from_start.extend(kept),
        }
        let words = [rule].into_iter().chain(self.flags());
        Ok(Resumed {
            config,
            typed: words.collect::<Vec<_>>().join(" "),
            from_state,
            from_start,
        })
    }

    /// Whether what was typed is the rule of a configuration, with other hyper-parameters. A library's has its own.
    fn is_rule_of(&self, config: &AnyRule) -> Result<bool> {
        if self.fields.preset.is_some() {
            return Ok(false);
        }
        let Some(rule) = &self.rule else {
            return Ok(true);
        };
        let preset = fields_of(&RulePreset::find(rule, None)?.config(0.0)?)?;
        Ok(preset.get(RULE) == fields_of(config)?.get(RULE))
    }

    /// The form and hyper-parameters that were typed.
    fn flags(&self) -> Vec<String> {
        let mut flags = self.fields.flags();
        flags.extend(self.form.iter().map(|form| format!("--form {form}")));
        flags
    }

    /// The name of the rule that was typed.
    pub fn name(&self) -> String {
        let rule = self.rule.as_deref().unwrap_or(DEFAULT);
        [rule.to_owned()]
            .into_iter()
            .chain(self.flags())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Whether nothing was typed.
    pub fn is_default(&self) -> bool {
        self.rule.is_none() && self.flags().is_empty()
    }

    /// Refuses hyper-parameters where no rule is named.
    pub fn check_named(&self) -> Result<()> {
        match (&self.rule, &self.form) {
            (None, Some(_)) => Err(anyhow!("--form goes with --rule")),
            (None, None) => self.fields.check_none(),
            (Some(_), _) => Ok(()),
        }
    }
}

/// Differences from a rule's defaults. Each has the name of the rule's field, and is refused where the rule has
/// none of that name.
#[derive(Clone, Debug, Default, ClapArgs)]
#[command(next_help_heading = HEADING)]
pub struct FieldArgs {
    /// Learning rate; where it may be left out, at most 0.1, and less where that would cancel parameters
    #[arg(long, value_name = "X")]
    pub lr: Option<f64>,
    /// Library whose version of the rule it is, with its defaults: pytorch, optax, keras, schedulefree, or a form of it
    /// (of sgd, for one, optax-sgd, optax-trace, optax-ema, tensorflow-js and sutskever-2013); PyTorch unless it has
    /// none
    #[arg(long, value_name = "LIBRARY")]
    pub preset: Option<String>,
    /// Momentum; zero is none
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub momentum: Option<f64>,
    /// Dampening of the gradient, but not at a tensor's first step
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub dampening: Option<f64>,
    /// Nesterov momentum
    #[arg(long)]
    pub nesterov: bool,
    /// Weight decay, which joins the gradient (L2), unless --decoupled, or the preset's multiplies the parameters
    /// anyway
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub weight_decay: Option<f64>,
    /// Let weight decay multiply the parameters by 1 - lr*X before the step instead
    #[arg(long)]
    pub decoupled: bool,
    /// Ascend instead of descend: for gradients of what is to grow, and for pseudo-gradients of new minus old
    /// parameters
    #[arg(long)]
    pub maximize: bool,
    /// Time step of the particle form
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub time_step: Option<f64>,
    /// Decay of the average of the gradient
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub beta1: Option<f64>,
    /// Decay of the average of the gradient's square
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub beta2: Option<f64>,
    /// Epsilon that keeps a divisor from zero
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub eps: Option<f64>,
    /// Epsilon under the root of a divisor
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub eps_root: Option<f64>,
    /// Divide by the largest average so far: of-average (without a value) or of-corrected
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "of-average")]
    pub amsgrad: Option<String>,
    /// Decay of the average of squares
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub alpha: Option<f64>,
    /// Divide by the deviation from the average gradient
    #[arg(long)]
    pub centered: bool,
    /// Decay of the averages of squares
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub rho: Option<f64>,
    /// Decay of the learning rate from step to step
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub lr_decay: Option<f64>,
    /// Decay of the momentum from step to step
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub momentum_decay: Option<f64>,
    /// Start of the sums of squares
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    pub initial_accumulator: Option<f64>,
    /// Steps over which the learning rate grows to its full size
    #[arg(long, value_name = "N")]
    pub warmup_steps: Option<u64>,
    /// Set any other field of the rule by its name in state files: eps_in_sqrt=true, say
    #[arg(long = "set", value_name = "FIELD=VALUE", value_parser = parse_assignment)]
    pub others: Vec<(String, Value)>,
}

impl FieldArgs {
    /// A rule of this name and form with what was given in place of its preset's fields, checked; without a learning
    /// rate, at zero.
    pub fn config(&self, rule: &str, form: Option<&str>) -> Result<AnyRule> {
        let preset = RulePreset::find(rule, self.preset.as_deref())?;
        let decouples = preset.decouples_weight_decay();
        self.set_in(&preset.config(0.0)?, decouples, rule, form)
    }

    /// The configuration with what was given in place of its fields, checked. Weight decay stays what it is.
    pub fn in_place_of(&self, config: &AnyRule, form: Option<&str>) -> Result<AnyRule> {
        let fields = fields_of(config)?;
        let rule = name_of(&fields);
        let decouples = match (is_set(&fields, COUPLED), is_set(&fields, DECOUPLED)) {
            (false, true) => true,
            (true, false) => false,
            _ => RulePreset::find(rule, None).is_ok_and(|preset| preset.decouples_weight_decay()),
        };
        // At zero no other field is out of range.
        let set = self.set_in(&config.with_lr(0.0)?, decouples, rule, form)?;
        match self.has_lr() {
            true => Ok(set),
            false => Ok(set.with_lr(config.lr())?),
        }
    }

    /// What was given in place of a configuration's fields; whether weight decay is decoupled unless that was given, too.
    fn set_in(
        &self,
        config: &AnyRule,
        decouples: bool,
        rule: &str,
        form: Option<&str>,
    ) -> Result<AnyRule> {
        let defaults = fields_of(config)?;
        let mut fields = defaults.clone();
        let missing = |flag: String, field: &str| anyhow!("{flag}: the rule {rule} has no {field}");
        let mut given = self.given();
        given.extend(form.map(|form| ("form", form.into())));
        for (field, value) in &given {
            let of_rule = fields.get_mut(*field);
            *of_rule.ok_or_else(|| missing(flag_of(field), field))? = value.clone();
        }
        self.check_set_once(&given)?;
        for (field, value) in &self.others {
            let of_rule = fields.get_mut(field).filter(|_| field != RULE);
            *of_rule.ok_or_else(|| missing("--set".to_owned(), field))? = value.clone();
        }
        if self.decoupled && !fields.contains_key(DECOUPLED) {
            return Err(missing("--decoupled".to_owned(), DECOUPLED));
        }
        if let Some(decay) = self.weight_decay {
            let decoupled = self.decoupled || decouples || !fields.contains_key(COUPLED);
            let (sets, clears) = match decoupled {
                true => (DECOUPLED, COUPLED),
                false => (COUPLED, DECOUPLED),
            };
            *fields
                .get_mut(sets)
                .ok_or_else(|| missing(flag_of(COUPLED), COUPLED))? = decay.into();
            if let Some(other) = fields.get_mut(clears) {
                *other = 0.0.into();
            }
        }
        let config = serde_json::from_value(Value::Object(fields));
        let config: AnyRule = config.map_err(|error: serde_json::Error| {
            let given = given.iter();
            let given = given.map(|(field, value)| (as_typed(field, value), *field, value));
            let others = self.others.iter();
            let others = others.map(|(field, value)| (as_set(field, value), &**field, value));
            naming_its_field(&defaults, given.chain(others), &error.to_string())
        })?;
        Ok(match self.lr {
            Some(lr) => config.with_lr(lr)?,
            None => config,
        })
    }

    /// Whether a learning rate was given.
    pub fn has_lr(&self) -> bool {
        self.lr.is_some() || self.others.iter().any(|(field, _)| field == LR)
    }

    /// Makes sure that no field that `--set` sets is set by a flag of its own, too, or by another `--set`: one of both
    /// would go unheard.
    fn check_set_once(&self, given: &[(&str, Value)]) -> Result<()> {
        let mut set: Vec<(&str, String)> = Vec::new();
        set.extend(
            given
                .iter()
                .map(|(field, value)| (*field, as_typed(field, value))),
        );
        set.extend(self.lr.map(|lr| (LR, format!("--lr {lr}"))));
        let decay = self
            .weight_decay
            .map(|decay| format!("--weight-decay {decay}"));
        let decoupled = self.decoupled.then(|| "--decoupled".to_owned());
        for flag in decay.into_iter().chain(decoupled) {
            set.extend([COUPLED, DECOUPLED].map(|field| (field, flag.clone())));
        }
        for (field, value) in &self.others {
            let assignment = as_set(field, value);
            if let Some((_, other)) = set.iter().find(|(other, _)| other == field) {
                return Err(anyhow!(
                    "{other} and {assignment} set the same field of the rule: expected one of them"
                ));
            }
            set.push((field, assignment));
        }
        Ok(())
    }

    /// The fields that were given, but for weight decay, by the rule's names.
    fn given(&self) -> Vec<(&'static str, Value)> {
        let number = |value: Option<f64>| value.map(Value::from);
        let switch = |on: bool| on.then_some(Value::Bool(true));
        let fields = [
            ("momentum", number(self.momentum)),
            ("dampening", number(self.dampening)),
            ("nesterov", switch(self.nesterov)),
            ("maximize", switch(self.maximize)),
            ("time_step", number(self.time_step)),
            ("beta1", number(self.beta1)),
            ("beta2", number(self.beta2)),
            ("eps", number(self.eps)),
            ("eps_root", number(self.eps_root)),
            ("amsgrad", self.amsgrad.clone().map(Value::from)),
            ("alpha", number(self.alpha)),
            ("centered", switch(self.centered)),
            ("rho", number(self.rho)),
            ("lr_decay", number(self.lr_decay)),
            ("momentum_decay", number(self.momentum_decay)),
            (
                "initial_accumulator_value",
                number(self.initial_accumulator),
            ),
            ("warmup_steps", self.warmup_steps.map(Value::from)),
        ];
        let given = fields.into_iter();
        given
            .filter_map(|(field, value)| Some((field, value?)))
            .collect()
    }

    /// The names of the fields that were given, weight decay's both.
    fn fields_set(&self) -> impl Iterator<Item = &str> {
        let given = self.given().into_iter().map(|(field, _)| field);
        let decay = self.decoupled || self.weight_decay.is_some();
        let decay = decay.then_some([COUPLED, DECOUPLED]).into_iter().flatten();
        let others = self.others.iter().map(|(field, _)| &**field);
        let lr = self.lr.map(|_| LR);
        given.chain(decay).chain(others).chain(lr)
    }

    /// Everything that was given, as it is typed.
    fn flags(&self) -> Vec<String> {
        let text = |flag: &str, value: &dyn ToString| format!("{flag} {}", value.to_string());
        let mut flags = Vec::new();
        flags.extend(self.preset.iter().map(|library| text("--preset", library)));
        flags.extend(self.lr.iter().map(|lr| text("--lr", lr)));
        let given = self.given();
        flags.extend(given.iter().map(|(field, value)| as_typed(field, value)));
        let others = self.others.iter();
        flags.extend(others.map(|(field, value)| as_set(field, value)));
        flags.extend(self.weight_decay.iter().map(|x| text("--weight-decay", x)));
        flags.extend(self.decoupled.then(|| "--decoupled".to_owned()));
        flags
    }

    /// A rule of this name with what was given, as it is typed.
    pub fn name(&self, rule: &str) -> String {
        [rule.to_owned()]
            .into_iter()
            .chain(self.flags())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Refuses everything, where no rule is named that could have it.
    pub fn check_none(&self) -> Result<()> {
        match self.flags().first() {
            Some(flag) => Err(anyhow!("{flag} goes with --rule")),
            None => Ok(()),
        }
    }
}

/// The names of all rules, each once.
pub fn names() -> Vec<&'static str> {
    let mut names = Vec::new();
    for RulePreset { rule, .. } in AnyRule::presets() {
        if !names.contains(&rule) {
            names.push(rule);
        }
    }
    names
}

/// An error that does not say which field it is of, if that has the same error by itself.
fn naming_its_field<'f>(
    defaults: &Map<String, Value>,
    mut set: impl Iterator<Item = (String, &'f str, &'f Value)>,
    error: &str,
) -> anyhow::Error {
    let fails_alone = |field: &str, value: &Value| {
        let mut fields = defaults.clone();
        fields.insert(field.to_owned(), value.clone());
        let config = serde_json::from_value::<AnyRule>(Value::Object(fields));
        config.is_err_and(|alone| alone.to_string() == error)
    };
    let its = set.find(|(_, field, value)| !error.contains(field) && fails_alone(field, value));
    match its {
        Some((typed, ..)) => anyhow!("{typed}: {error}"),
        None => anyhow!("{error}"),
    }
}

/// A field's flag and its value.
fn as_typed(field: &str, value: &Value) -> String {
    match value {
        Value::Bool(_) => flag_of(field),
        Value::String(value) => format!("{} {value}", flag_of(field)),
        value => format!("{} {value}", flag_of(field)),
    }
}

/// A field that has no flag, and its value.
fn as_set(field: &str, value: &Value) -> String {
    match value {
        Value::String(value) => format!("--set {field}={value}"),
        value => format!("--set {field}={value}"),
    }
}

/// The fields of a configuration, its rule among them.
pub fn fields_of(config: &AnyRule) -> Result<Map<String, Value>> {
    match serde_json::to_value(config)? {
        Value::Object(fields) => Ok(fields),
        other => Err(anyhow!("{other} has no fields")),
    }
}

/// The name by which a rule of these fields is typed: of several that differ in the kind of weight decay the one of theirs.
fn name_of(fields: &Map<String, Value>) -> &'static str {
    let is_named = |preset: &RulePreset| {
        let own = preset.config(0.0).ok();
        let own = own.and_then(|config| fields_of(&config).ok());
        own.is_some_and(|own| own.get(RULE) == fields.get(RULE))
    };
    let is_decoupled = is_set(fields, DECOUPLED);
    let of_rules = names()
        .into_iter()
        .filter_map(|rule| RulePreset::find(rule, None).ok());
    let mut named: Vec<_> = of_rules.filter(is_named).collect();
    // Stable: else the first.
    named.sort_by_key(|preset| preset.decouples_weight_decay() != is_decoupled);
    named.first().map_or(DEFAULT, |preset| preset.rule)
}

fn is_set(fields: &Map<String, Value>, field: &str) -> bool {
    let value = fields.get(field).and_then(Value::as_f64);
    value.is_some_and(|value| value != 0.0)
}

/// A rule and those of its fields that do something, in words.
fn in_words(fields: &Map<String, Value>) -> String {
    let others = fields.iter().filter(|(field, _)| *field != RULE);
    let others: Map<_, _> = others
        .map(|(field, value)| (field.clone(), value.clone()))
        .collect();
    format!("{}: {}", name_of(fields), list(&others))
}

/// Fields and their values, but for those that switch something off.
pub fn list(fields: &Map<String, Value>) -> String {
    let is_off = |value: &Value| match value {
        Value::Null => true,
        Value::Bool(is_on) => !is_on,
        Value::String(word) => word == "off",
        value => value.as_f64() == Some(0.0),
    };
    let fields = fields.iter().filter(|(_, value)| !is_off(value));
    let words = fields.map(|(field, value)| match value {
        Value::Bool(_) => field.clone(),
        Value::String(word) => format!("{field} {word}"),
        value => format!("{field} {value}"),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// A rule that goes on, and where its hyper-parameters are from.
#[derive(Clone, Debug, Serialize)]
pub struct Resumed {
    /// The rule with all its fields.
    #[serde(flatten)]
    pub config: AnyRule,
    /// What was typed of it.
    #[serde(skip)]
    pub typed: String,
    /// The fields that are what they were where the state was made, because nothing else was typed.
    pub from_state: Map<String, Value>,
    /// The fields that are the command's own where there is no state.
    #[serde(skip)]
    from_start: Map<String, Value>,
}

impl Resumed {
    /// In one line; `state` is the file of the state.
    pub fn to_text(&self, state: Option<&Path>) -> String {
        let Self {
            typed,
            from_state,
            from_start,
            ..
        } = self;
        match (list(from_state), list(from_start), state) {
            (fields, _, Some(state)) if !fields.is_empty() => {
                format!("{typed}; {fields} from {}", state.display())
            }
            (_, fields, _) if !fields.is_empty() => format!("{typed}; {fields} by default"),
            _ => typed.clone(),
        }
    }
}

fn flag_of(field: &str) -> String {
    let name = match field {
        "initial_accumulator_value" => "initial_accumulator",
        name => name,
    };
    format!("--{}", name.replace('_', "-"))
}

/// JSON, through which the fields go, has no other numbers.
fn parse_finite(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().map_err(|error| error.to_string())?;
    match number.is_finite() {
        true => Ok(number),
        false => Err("expected a finite number".to_owned()),
    }
}

/// A field and its value, in JSON or as a bare word.
pub fn parse_assignment(text: &str) -> Result<(String, Value), String> {
    let (field, value) = text
        .split_once('=')
        .ok_or_else(|| "expected FIELD=VALUE".to_owned())?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((field.to_owned(), value))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use clap::Parser as _;
    use wgpu_optim::rules::sgd::MomentumForm;
    use wgpu_optim::rules::{AdamForm, AmsGrad};
    use wgpu_optim::{AdamConfig, SgdConfig};

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        rule: RuleArgs,
    }

    fn parsed(line: &str) -> RuleArgs {
        let words = line.split_whitespace();
        Line::parse_from(["wgpu-optim"].into_iter().chain(words)).rule
    }

    fn config(line: &str) -> Result<AnyRule> {
        parsed(line).config()
    }

    fn fields(config: &AnyRule) -> Map<String, Value> {
        match serde_json::to_value(config).unwrap() {
            Value::Object(fields) => fields,
            other => panic!("{other}"),
        }
    }

    /// The flags that set a field of their own name, with a value that any rule may have.
    fn samples() -> Vec<(&'static str, String, Value)> {
        let number = |field, value: f64| (field, format!(" {value}"), Value::from(value));
        let switch = |field| (field, String::new(), Value::Bool(true));
        vec![
            number("momentum", 0.75),
            number("dampening", 0.25),
            switch("nesterov"),
            switch("maximize"),
            number("time_step", 0.5),
            number("beta1", 0.75),
            number("beta2", 0.875),
            number("eps", 0.125),
            number("eps_root", 0.125),
            ("amsgrad", String::new(), "of-average".into()),
            number("alpha", 0.75),
            switch("centered"),
            number("rho", 0.75),
            number("lr_decay", 0.125),
            number("momentum_decay", 0.125),
            number("initial_accumulator_value", 0.25),
            ("warmup_steps", " 8".to_owned(), 8u64.into()),
        ]
    }

    #[test]
    fn every_flag_sets_its_field_or_is_refused_where_there_is_none() {
        for preset in AnyRule::presets() {
            let RulePreset { rule, library, .. } = preset;
            let defaults = fields_of(&preset.config(0.0).unwrap()).unwrap();
            for (field, text, value) in samples() {
                let flag = flag_of(field);
                let line = format!("--rule {rule} --preset {library} --lr 0 {flag}{text}");
                let config = config(&line);
                if !defaults.contains_key(field) {
                    let expected = format!("{flag}: the rule {rule} has no {field}");
                    assert_eq!(config.unwrap_err().to_string(), expected, "{line}");
                    continue;
                }
                match config {
                    Ok(config) => {
                        let mut expected = defaults.clone();
                        let is_number = expected[field].is_f64();
                        let value = value
                            .as_f64()
                            .filter(|_| is_number)
                            .map_or(value, Value::from);
                        expected.insert(field.to_owned(), value);
                        assert_eq!(fields(&config), expected, "{line}");
                    }
                    // It does not go with the other fields.
                    Err(error) => assert!(error.to_string().contains(field), "{line}: {error}"),
                }
            }
        }
    }

    #[test]
    fn every_field_can_be_set_by_its_name() {
        for preset in AnyRule::presets() {
            let RulePreset { rule, library, .. } = preset;
            let defaults = fields_of(&preset.config(0.0).unwrap()).unwrap();
            for (field, value) in &defaults {
                let line = format!("--rule {rule} --preset {library} --lr 0 --set {field}={value}");
                match (field.as_str(), config(&line)) {
                    ("rule" | LR, refused) => assert!(refused.is_err(), "{line}"),
                    (_, config) => assert_eq!(fields(&config.unwrap()), defaults, "{line}"),
                }
                let wrong = line.replace(&format!("={value}"), "=[]");
                assert!(config(&wrong).is_err(), "{wrong}");
            }
        }
        let eps = config("--rule rmsprop --lr 0.1 --set eps_in_sqrt=true").unwrap();
        assert_eq!(fields(&eps)["eps_in_sqrt"], true);
        let form = config("--rule sgd --lr 0.1 --momentum 0.9 --set form=ema").unwrap();
        assert_eq!(fields(&form)["form"], "ema");
        let lr = config("--rule lion --set lr=0.25").unwrap();
        assert_eq!(lr.lr(), 0.25);
        let missing = config("--rule lion --lr 0.1 --set eps=1").unwrap_err();
        assert_eq!(missing.to_string(), "--set: the rule lion has no eps");
    }

    #[test]
    fn an_epsilon_that_f32_does_not_hold_is_refused_by_its_name() {
        for line in [
            "--rule adam --eps 1e-46",
            "--rule adagrad --preset optax --set eps=1e-46",
        ] {
            let refused = config(&format!("{line} --lr 0.1")).unwrap_err().to_string();
            let expected = "eps = 1e-46 is zero in f32: expected at least";
            assert!(refused.starts_with(expected), "{refused}");
        }
    }

    #[test]
    fn a_field_that_is_set_twice_is_refused_by_both_names() {
        for (line, first, second) in [
            ("--eps 0.5 --set eps=0.25", "--eps 0.5", "--set eps=0.25"),
            (
                "--set eps=0.5 --set eps=0.5",
                "--set eps=0.5",
                "--set eps=0.5",
            ),
            (
                "--maximize --set maximize=false",
                "--maximize",
                "--set maximize=false",
            ),
            (
                "--form epsilon-hat --set form=corrected",
                "--form epsilon-hat",
                "--set form=corrected",
            ),
            ("--set lr=0.5", "--lr 1", "--set lr=0.5"),
            (
                "--weight-decay 0.5 --set weight_decay=0.25",
                "--weight-decay 0.5",
                "--set weight_decay=0.25",
            ),
            (
                "--weight-decay 0.5 --set decoupled_weight_decay=0.25",
                "--weight-decay 0.5",
                "--set decoupled_weight_decay=0.25",
            ),
            (
                "--decoupled --set weight_decay=0.25",
                "--decoupled",
                "--set weight_decay=0.25",
            ),
        ] {
            let line = format!("--rule adam --lr 1 {line}");
            assert_eq!(
                config(&line).unwrap_err().to_string(),
                format!(
                    "{first} and {second} set the same field of the rule: expected one of them"
                ),
            );
        }
        // Every flag, with what its own field is anyway.
        for preset in AnyRule::presets() {
            let RulePreset { rule, library, .. } = preset;
            let defaults = fields_of(&preset.config(0.0).unwrap()).unwrap();
            for (field, text, value) in samples() {
                if !defaults.contains_key(field) {
                    continue;
                }
                let flag = flag_of(field);
                let line = format!(
                    "--rule {rule} --preset {library} --lr 0 {flag}{text} --set {field}={value}"
                );
                let line = line.replace('"', "");
                let error = config(&line).unwrap_err().to_string();
                assert!(
                    error.starts_with(&flag) && error.contains(&format!(" and --set {field}=")),
                    "{line}: {error}"
                );
            }
        }
    }

    #[test]
    fn a_value_that_means_nothing_is_refused_by_its_field() {
        for preset in AnyRule::presets() {
            let RulePreset { rule, library, .. } = preset;
            let defaults = fields_of(&preset.config(0.0).unwrap()).unwrap();
            for field in defaults.keys().filter(|field| *field != "rule") {
                for value in ["null", "[]", "nonsense"] {
                    // Another one that is set, and is in order.
                    let other = defaults
                        .iter()
                        .find(|(other, _)| *other != field && *other != "rule");
                    let (other, sound) = other.unwrap();
                    let line = format!(
                        "--rule {rule} --preset {library} --set {other}={sound} --set {field}={value}"
                    );
                    let error = config(&line).unwrap_err().to_string();
                    assert!(error.contains(field.as_str()), "{line}: {error}");
                }
            }
        }
        let error = config("--rule adam --lr 1 --set eps=null").unwrap_err();
        assert_eq!(
            error.to_string(),
            "--set eps=null: invalid type: null, expected f64"
        );
        let error = config("--rule adam --lr 1 --amsgrad nonsense --beta1 0.5").unwrap_err();
        assert!(
            error.to_string().starts_with("--amsgrad nonsense: "),
            "{error}"
        );
    }

    #[test]
    fn weight_decay_is_what_the_rule_the_preset_or_the_flag_says() {
        for preset in AnyRule::presets() {
            let RulePreset { rule, library, .. } = preset;
            let defaults = fields_of(&preset.config(0.0).unwrap()).unwrap();
            let has = |field| defaults.contains_key(field);
            for flag in ["", " --decoupled"] {
                let line =
                    format!("--rule {rule} --preset {library} --lr 0 --weight-decay 0.5{flag}");
                let config = config(&line);
                let asked = !flag.is_empty();
                let decoupled = asked || preset.decouples_weight_decay() || !has(COUPLED);
                let (sets, clears) = if decoupled {
                    (DECOUPLED, COUPLED)
                } else {
                    (COUPLED, DECOUPLED)
                };
                if !has(sets) {
                    let error = config.unwrap_err().to_string();
                    assert!(
                        error.contains(&format!("the rule {rule} has no ")),
                        "{error}"
                    );
                    continue;
                }
                let config = match config {
                    Ok(config) => config,
                    // Schedule-free SGD has the coupled one alone.
                    Err(error) => {
                        assert!(
                            asked && error.to_string().contains(DECOUPLED),
                            "{line}: {error}"
                        );
                        continue;
                    }
                };
                let fields = fields(&config);
                assert_eq!(fields[sets], 0.5, "{line}");
                assert!(
                    fields.get(clears).is_none_or(|other| *other == 0.0),
                    "{line}"
                );
            }
        }
    }

    #[test]
    fn lines_are_the_configurations_that_they_say() {
        let sgd = SgdConfig::builder(0.5);
        let adam = AdamConfig::builder(0.5);
        let heavy_ball = sgd.momentum(0.75);
        for (line, expected) in [
            ("", sgd.build().unwrap().into()),
            (
                "--momentum 0.75 --nesterov",
                heavy_ball.nesterov(true).build().unwrap().into(),
            ),
            (
                "--momentum 0.75 --dampening 0.5",
                heavy_ball.dampening(0.5).build().unwrap().into(),
            ),
            (
                "--momentum 0.75 --form particle --time-step 0.5",
                heavy_ball
                    .form(MomentumForm::Particle)
                    .time_step(0.5)
                    .build()
                    .unwrap()
                    .into(),
            ),
            (
                "--preset keras --momentum 0.75 --weight-decay 0.25",
                heavy_ball
                    .form(MomentumForm::LrInside)
                    .decoupled_weight_decay(0.25)
                    .build()
                    .unwrap()
                    .into(),
            ),
            ("--decoupled", sgd.build().unwrap().into()),
            ("--rule adam", AnyRule::from(adam.build().unwrap())),
            (
                "--rule adam --form epsilon-hat --beta1 0.5 --maximize",
                adam.form(AdamForm::EpsilonHat)
                    .betas(0.5, 0.999)
                    .maximize(true)
                    .build()
                    .unwrap()
                    .into(),
            ),
            (
                "--rule adamw --amsgrad of-corrected --weight-decay 0.25",
                adam.amsgrad(AmsGrad::OfCorrected)
                    .decoupled_weight_decay(0.25)
                    .build()
                    .unwrap()
                    .into(),
            ),
        ] {
            let line = format!("{line} --lr 0.5");
            assert_eq!(config(&line).unwrap(), expected, "{line}");
        }
        // A default that would be too large at this learning rate is not in the way.
        assert!(config("--rule adamw --lr 1000").is_err());
        assert!(config("--rule adamw --lr 1000 --weight-decay 0").is_ok());
    }

    #[test]
    fn a_rule_is_called_what_was_typed() {
        let line =
            "--rule adamw --beta2 0.95 --amsgrad --preset keras --weight-decay 0.1 --decoupled";
        assert_eq!(
            parsed(line).name(),
            "adamw --preset keras --beta2 0.95 --amsgrad of-average --weight-decay 0.1 --decoupled"
        );
        assert_eq!(
            parsed("--form ema --lr 1e-3").name(),
            "sgd --lr 0.001 --form ema"
        );
    }

    #[test]
    fn only_a_rule_has_hyper_parameters() {
        for (line, flag) in [
            ("--beta1 0.5", "--beta1"),
            ("--form ema", "--form"),
            ("--lr 1", "--lr"),
        ] {
            let refused = parsed(line).check_named().unwrap_err().to_string();
            assert!(
                refused.contains(flag) && refused.contains("--rule"),
                "{refused}"
            );
            parsed(&format!("--rule sgd {line}")).check_named().unwrap();
        }
        parsed("").check_named().unwrap();
    }
}
