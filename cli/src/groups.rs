//! Parameter groups, as they are typed: tensors by the globs that their names match, and the hyper-parameters that they
//! have in place of all others'. A state file holds them under `groups`, as JSON: a list of objects with the globs under
//! `match` and fields of the rule beside.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args as ClapArgs;
use glob::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use wgpu_optim::rules::Slot;
use wgpu_optim::{AnyRule, Rule as _};
use wgpu_optim_files::Model;

use crate::rule::{self, FieldArgs, Resumed};

/// The metadata of a state's files that hold its groups.
const KEY: &str = "groups";

/// The key of a group that is no field of its rule: globs of the names of its tensors.
const MATCH: &str = "match";

/// Names that an error lists.
const LISTED: usize = 8;

/// Groups as they are typed.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct GroupArgs {
    /// Give the tensors whose names match hyper-parameters of their own: match=GLOB, several if any will do, and fields
    /// of the rule, such as lr and weight_decay. The first group that matches takes a tensor. match=*.bias,weight_decay=0
    /// is no decay on biases. Given again, it is another group; without any, groups are the state's
    #[arg(long = "group", value_name = "match=GLOB,FIELD=VALUE,..", value_parser = parse)]
    group: Vec<GroupSpec>,
    /// Leave the groups out that the state was made with
    #[arg(long, conflicts_with = "group")]
    no_groups: bool,
}

/// One group as it is typed, and as it stands in a state file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSpec {
    #[serde(rename = "match")]
    globs: Vec<String>,
    #[serde(flatten)]
    fields: Map<String, Value>,
}

/// The groups of a step: those that were typed, or that a state was made with, and the group of all other tensors, the
/// last.
#[derive(Debug)]
pub struct Groups {
    groups: Vec<Group>,
    specs: Vec<GroupSpec>,
    is_from_state: bool,
}

/// The tensors of a group have one configuration.
#[derive(Debug)]
pub struct Group {
    globs: Vec<Pattern>,
    /// The group as the user has typed it, for reports and errors.
    name: String,
    pub config: AnyRule,
    /// The slots that its rule keeps.
    pub slots: Vec<Slot>,
}

/// A group in a report.
#[derive(Debug, Serialize)]
pub struct GroupReport {
    pub group: String,
    pub tensors: usize,
    pub numel: u64,
    #[serde(skip)]
    is_from_state: bool,
}

impl Group {
    fn new(name: String, globs: Vec<Pattern>, config: AnyRule) -> Self {
        Self {
            slots: config.slots().kept().copied().collect(),
            globs,
            name,
            config,
        }
    }

    fn takes(&self, tensor: &str) -> bool {
        self.globs.iter().any(|glob| glob.matches(tensor))
    }
}

impl GroupSpec {
    /// The group whose tensors have these hyper-parameters in place of `others`.
    fn group(&self, others: &AnyRule) -> Result<Group> {
        let fields = rule::fields_of(others)?;
        let mut args = FieldArgs::default();
        for (field, value) in &self.fields {
            let number = || value.as_f64().context("expected a number");
            match &**field {
                "lr" => args.lr = Some(number().with_context(|| format!("lr={value}"))?),
                // One of both, as `--weight-decay` has it.
                "weight_decay" => {
                    args.weight_decay = Some(number().with_context(|| format!("{field}={value}"))?);
                }
                _ if fields.contains_key(field) && field != "rule" => {
                    args.others.push((field.clone(), value.clone()));
                }
                _ => {
                    let known = fields.keys().filter(|field| *field != "rule");
                    let known: Vec<_> = known.map(String::as_str).collect();
                    bail!(
                        "the rule has no {field}, expected {MATCH} or one of {}",
                        known.join(", ")
                    );
                }
            }
        }
        let config = args.in_place_of(others, None)?;
        let (expected, actual) = (others.state_kind(), config.state_kind());
        ensure!(
            actual == expected,
            "the state of its tensors would be of the {actual} form, expected {expected}, as that of all others"
        );
        let globs = self.globs.iter().map(|glob| pattern(glob));
        Ok(Group::new(
            self.to_text(),
            globs.collect::<Result<_>>()?,
            config,
        ))
    }

    /// The group as a user would type it.
    fn to_text(&self) -> String {
        let globs = self.globs.iter().map(|glob| format!("{MATCH}={glob}"));
        let fields = self.fields.iter().map(|(field, value)| match value {
            Value::String(word) => format!("{field}={word}"),
            value => format!("{field}={value}"),
        });
        globs.chain(fields).collect::<Vec<_>>().join(",")
    }
}

impl Groups {
    /// The groups of a rule over a model: those that were typed, else those that the state was made with.
    ///
    /// # Errors
    /// If a group has a field that the rule has not, or matches no tensor of the model.
    pub fn new(
        args: &GroupArgs,
        rule: &Resumed,
        state: Option<&Model>,
        params: &Model,
    ) -> Result<Self> {
        let saved = state.map(of_state).transpose()?.flatten();
        let is_from_state = args.group.is_empty() && !args.no_groups && saved.is_some();
        let specs = match is_from_state {
            true => saved.unwrap_or_default(),
            false => args.group.clone(),
        };
        let mut groups = Vec::new();
        for spec in &specs {
            let named = || match is_from_state {
                true => format!("group {} of the state", spec.to_text()),
                false => format!("--group {}", spec.to_text()),
            };
            let group = spec.group(&rule.config).with_context(named)?;
            let mut tensors = params.in_place_order().map(|place| &*place.entry.name);
            if !tensors.any(|tensor| group.takes(tensor)) {
                bail!("{}: it matches no tensor; {}", named(), names_in(params));
            }
            groups.push(group);
        }
        groups.push(Group::new("all others".into(), vec![], rule.config.clone()));
        Ok(Self {
            groups,
            specs,
            is_from_state,
        })
    }

    /// Which group takes a tensor.
    pub fn of(&self, tensor: &str) -> usize {
        let found = self.groups.iter().position(|group| group.takes(tensor));
        found.unwrap_or(self.groups.len() - 1)
    }

    /// A group by its place.
    pub fn get(&self, group: usize) -> &Group {
        &self.groups[group]
    }

    /// All of them; the last takes the tensors that no other one does.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Group> {
        self.groups.iter()
    }

    /// The configuration of the tensors that no group takes.
    pub fn config(&self) -> &AnyRule {
        &self.groups[self.groups.len() - 1].config
    }

    /// Says in the metadata of a state's file which groups it was made with.
    pub fn put(&self, metadata: &mut Vec<(String, String)>) -> Result<()> {
        if !self.specs.is_empty() {
            metadata.push((KEY.to_owned(), serde_json::to_string(&self.specs)?));
        }
        Ok(())
    }

    /// Sentences on other groups than a state was made with.
    pub fn notes(&self, state: &Model) -> Result<Option<String>> {
        let before = of_state(state)?.unwrap_or_default();
        let text = |specs: &[GroupSpec]| {
            let texts: Vec<_> = specs.iter().map(GroupSpec::to_text).collect();
            match texts.is_empty() {
                true => "none".to_owned(),
                false => texts.join(" and "),
            }
        };
        Ok((before != self.specs).then(|| {
            format!(
                "groups are {}, and were {} where the state was made",
                text(&self.specs),
                text(&before)
            )
        }))
    }

    /// What each group has of tensors of these groups and sizes; nothing where there is but one.
    pub fn report(&self, tensors: impl Iterator<Item = (usize, u64)>) -> Vec<GroupReport> {
        let mut sizes: BTreeMap<usize, (usize, u64)> = BTreeMap::new();
        for (group, numel) in tensors {
            let (tensors, elems) = sizes.entry(group).or_default();
            *tensors += 1;
            *elems += numel;
        }
        let groups = self.groups.iter().enumerate();
        let groups = groups.filter(|_| !self.specs.is_empty());
        groups
            .map(|(index, group)| {
                let (tensors, numel) = sizes.get(&index).copied().unwrap_or_default();
                GroupReport {
                    group: group.name.clone(),
                    tensors,
                    numel,
                    is_from_state: self.is_from_state && !group.globs.is_empty(),
                }
            })
            .collect()
    }
}

impl GroupReport {
    /// In one line; `state` is the file of the state.
    pub fn to_text(&self, state: Option<&Path>) -> String {
        let Self {
            group,
            tensors,
            numel,
            ..
        } = self;
        let from = state.filter(|_| self.is_from_state);
        let from = from.map_or_else(String::new, |path| format!("; from {}", path.display()));
        format!("{group}: {tensors} tensors, {numel} elements{from}")
    }
}

/// The groups that a state was made with, if it says so.
fn of_state(state: &Model) -> Result<Option<Vec<GroupSpec>>> {
    let json = state.metadata(KEY).next();
    json.map(|json| {
        serde_json::from_str(json).with_context(|| format!("the state's metadata {KEY}"))
    })
    .transpose()
}

/// Refuses a state that was made with groups, where there can be none.
///
/// # Errors
/// If it was.
pub fn check_none(state: &Model) -> Result<()> {
    match of_state(state)?.unwrap_or_default().first() {
        Some(spec) => bail!(
            "the state was made with groups, the first of them {}, and here all tensors have the same hyper-parameters",
            spec.to_text()
        ),
        None => Ok(()),
    }
}

/// Some of the names that a model has.
fn names_in(params: &Model) -> String {
    let names = params.in_place_order().map(|place| &place.entry.name);
    let listed: Vec<_> = names.take(LISTED).map(|name| format!("{name:?}")).collect();
    match params.len().checked_sub(LISTED) {
        Some(more @ 1..) => format!("there are {} and {more} more", listed.join(", ")),
        _ => format!("there are {}", listed.join(", ")),
    }
}

fn pattern(glob: &str) -> Result<Pattern> {
    Pattern::new(glob).map_err(|error| anyhow!("{MATCH}={glob}: {error}"))
}

/// A group: `match=GLOB` and fields of the rule, separated by commas.
fn parse(text: &str) -> Result<GroupSpec> {
    let mut spec = GroupSpec {
        globs: Vec::new(),
        fields: Map::new(),
    };
    for part in text.split(',') {
        let (field, value) = rule::parse_assignment(part).map_err(|error| anyhow!("{error}"))?;
        if field == MATCH {
            let (_, glob) = part.split_once('=').unwrap_or_default();
            pattern(glob)?;
            spec.globs.push(glob.to_owned());
        } else if spec.fields.insert(field.clone(), value).is_some() {
            bail!("{field} is given twice");
        }
    }
    ensure!(
        !spec.globs.is_empty(),
        "expected {MATCH}=GLOB, by the names of the tensors"
    );
    Ok(spec)
}
