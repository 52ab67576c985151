//! The real command, run on the files of a directory.

use std::collections::BTreeMap;
use std::fs;

use tempfile::TempDir;
use wgpu_optim::state::StateRecord;
use wgpu_optim::{AnyRule, Rule as _};

use crate::process::run;

/// How a step runs.
pub struct Hyper {
    /// The options that say which rule.
    rule: Vec<String>,
    /// Whether the rule keeps any state.
    keeps_state: bool,
    nonfinite: &'static str,
    /// The outputs take the places of the inputs.
    in_place: bool,
}

impl Hyper {
    /// `@` is momentum, and no gradient may be infinite or NaN. Bit 0 takes the momentum away, bits 1 and 2 say what
    /// else becomes of such gradients, bit 3 is in place.
    pub fn of(byte: u8) -> Self {
        let keeps_state = byte & 1 == 0;
        let momentum = if keeps_state { "0.9" } else { "0" };
        Self {
            rule: ["--momentum", momentum].map(str::to_owned).into(),
            keeps_state,
            nonfinite: ["refuse", "skip", "apply", "apply"][usize::from(byte >> 1 & 3)],
            in_place: byte >> 3 & 1 == 1,
        }
    }

    /// Goes on by the rule of a state, field by field; of the momentum family by its form.
    pub fn resume(&mut self, record: &StateRecord) {
        if let AnyRule::Sgd(config) = &record.config {
            let form = ["--form", config.form().name()];
            self.rule.extend(form.map(str::to_owned));
            return;
        }
        self.keeps_state = record.config.slots().kept().next().is_some();
        let fields = serde_json::to_value(&record.config).unwrap();
        self.rule = fields
            .as_object()
            .unwrap()
            .iter()
            .filter(|(field, _)| *field != "lr")
            .flat_map(|(field, value)| match (field.as_str(), value.as_str()) {
                ("rule", Some(rule)) => ["--rule".to_owned(), rule.to_owned()],
                _ => ["--set".to_owned(), format!("{field}={value}")],
            })
            .collect();
    }

    pub fn keeps_state(&self) -> bool {
        self.keeps_state
    }

    /// The name of an output that is an input, too.
    pub fn out(&self, name: &str) -> String {
        match self.in_place {
            true => name.to_owned(),
            false => format!("out/{name}"),
        }
    }
}

/// The names of the files that a step reads, and of the state that it writes.
pub struct Files<'f> {
    pub params: &'f str,
    pub grads: &'f str,
    pub state: Option<&'f str>,
    pub out_state: &'f str,
}

/// Whether a step was refused for what the files are, and not for the numbers in them or because there are no gradients.
pub fn is_of_form(said: String) -> bool {
    let others = ["the step would leave", "--grads holds no gradient"];
    !others.iter().any(|words| said.contains(words))
}

/// A directory with the files of a step.
pub struct Workspace(TempDir);

/// Every file with its content.
type Snapshot = BTreeMap<String, Vec<u8>>;

impl Workspace {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("out")).unwrap();
        Self(directory)
    }

    pub fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.0.path().join(name), content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.path().join(name)).unwrap()
    }

    /// A step, and where that is done, another from its outputs, which has to be done, too. Returns what was said of the
    /// first if it was refused.
    pub fn rounds(&self, hyper: &Hyper, files: &Files<'_>) -> Result<(), String> {
        let (out_params, out_state) = (hyper.out(files.params), hyper.out(files.out_state));
        self.step(hyper, files, &out_params, &out_state)?;
        let next = Files {
            params: &out_params,
            state: Some(&out_state),
            ..*files
        };
        let done = self.step(hyper, &next, &out_params, &out_state);
        assert!(
            !done.is_err_and(is_of_form),
            "what a step wrote, the next one refused"
        );
        Ok(())
    }

    /// If the step is done, its outputs are there, and the same whenever it runs. Otherwise nothing has changed; returns
    /// what was said.
    fn step(
        &self,
        hyper: &Hyper,
        files: &Files<'_>,
        out_params: &str,
        out_state: &str,
    ) -> Result<(), String> {
        let path = |name: &str| self.0.path().join(name).into_os_string();
        let mut args: Vec<_> = ["wgpu-optim", "step", "--device", "cpu", "--skip-non-float"]
            .map(Into::into)
            .into();
        for (option, name) in [
            ("--params", Some(files.params)),
            ("--grads", Some(files.grads)),
            ("--state", files.state),
            ("--out-params", Some(out_params)),
            ("--out-state", Some(out_state)),
        ] {
            args.extend(
                name.into_iter()
                    .flat_map(|name| [option.into(), path(name)]),
            );
        }
        for (option, value) in [("--lr", "0.1"), ("--nonfinite", hyper.nonfinite)] {
            args.extend([option.into(), value.into()]);
        }
        args.extend(hyper.rule.iter().map(Into::into));
        let before = self.snapshot();
        let (code, stderr) = run(&args);
        let after = self.snapshot();
        if code == 2 {
            assert!(
                after == before,
                "a step that was refused left something behind"
            );
            let line = stderr.strip_suffix('\n').unwrap();
            assert!(line.starts_with("error: "), "{stderr}");
            assert!(
                !line.contains(char::is_control),
                "{stderr:?} is not one line"
            );
            return Err(line.to_owned());
        }
        assert_eq!((code, &*stderr), (0, ""));
        self.restore(&before);
        assert_eq!(run(&args).0, 0);
        assert!(self.snapshot() == after, "the same step made other bytes");
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        let mut files = Snapshot::new();
        for directory in ["", "out/"] {
            for entry in fs::read_dir(self.0.path().join(directory)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    let name = path.file_name().unwrap().to_str().unwrap();
                    files.insert(format!("{directory}{name}"), fs::read(&path).unwrap());
                }
            }
        }
        files
    }

    fn restore(&self, files: &Snapshot) {
        for name in self.snapshot().keys() {
            fs::remove_file(self.0.path().join(name)).unwrap();
        }
        for (name, content) in files {
            self.write(name, content);
        }
    }
}
