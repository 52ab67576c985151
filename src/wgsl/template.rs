//! A small template language in which the kernels' WGSL is put together from the files in `shaders/`.
//!
//! A template is WGSL that editors can open: what is not WGSL in it stands in lines of comments.
//!
//! ```wgsl
//! //# if NAME          or: if not NAME. The lines up to `end` are there if NAME is true, or a list with something in it;
//! //# else             otherwise those behind `else`, if there is one.
//! //# end
//! //# for NAMES        The lines up to `end` are there for each item of the list, which knows words of its own.
//! //# end
//! ```
//!
//! Words that a scope knows are replaced wherever they stand for themselves or between underscores: `wo_load_SLOT` becomes
//! `wo_load_exp_avg`. They are in capitals.

/// The value of a name.
#[derive(Clone, Debug)]
enum Value {
    Flag(bool),
    Word(String),
    List(Vec<Scope>),
}

/// The names that a template, or an item of a list in it, knows.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope(Vec<(&'static str, Value)>);

impl Scope {
    pub(super) fn flag(mut self, name: &'static str, is_set: bool) -> Self {
        self.0.push((name, Value::Flag(is_set)));
        self
    }

    pub(super) fn word(mut self, name: &'static str, word: impl ToString) -> Self {
        self.0.push((name, Value::Word(word.to_string())));
        self
    }

    pub(super) fn list(
        mut self,
        name: &'static str,
        items: impl IntoIterator<Item = Scope>,
    ) -> Self {
        let items = items.into_iter().collect();
        self.0.push((name, Value::List(items)));
        self
    }

    /// The text that a template becomes.
    pub(super) fn render(&self, template: &str) -> String {
        let lines: Vec<_> = template.lines().collect();
        let mut out = String::with_capacity(template.len());
        render(&lines, &[self], &mut out);
        out
    }
}

/// The value of a name in the innermost of some scopes that knows it.
fn value<'a>(scopes: &[&'a Scope], name: &str) -> Option<&'a Value> {
    let mut named = scopes.iter().rev().flat_map(|scope| scope.0.iter().rev());
    let found = named.find(|(known, _)| *known == name);
    found.map(|(_, value)| value)
}

fn render(mut lines: &[&str], scopes: &[&Scope], out: &mut String) {
    while let [line, behind @ ..] = lines {
        let Some(command) = line.trim_start().strip_prefix("//# ") else {
            replace_words(line, scopes, out);
            lines = behind;
            continue;
        };
        let (block, otherwise, after) = branches(behind);
        let (command, name) = command.split_once(' ').unwrap_or_default();
        let (expected, name) = match name.strip_prefix("not ") {
            Some(name) => (false, name),
            None => (true, name),
        };
        let known = value(scopes, name);
        debug_assert!(known.is_some(), "a template asks for {name:?}");
        match (command, known) {
            ("for", Some(Value::List(items))) => {
                for item in items {
                    render(block, &[scopes, &[item]].concat(), out);
                }
            }
            (_, Some(Value::Flag(is))) if *is == expected => render(block, scopes, out),
            (_, Some(Value::List(items))) if items.is_empty() != expected => {
                render(block, scopes, out);
            }
            _ => render(otherwise, scopes, out),
        }
        lines = after;
    }
}

/// The lines of a block up to its `else`, those from there to its `end`, and those behind it.
fn branches<'a, 't>(lines: &'a [&'t str]) -> (&'a [&'t str], &'a [&'t str], &'a [&'t str]) {
    let (mut depth, mut otherwise) = (0_usize, None);
    for (index, line) in lines.iter().enumerate() {
        match line.trim_start().strip_prefix("//# ") {
            Some("else") if depth == 0 => otherwise = Some(index),
            Some("end") if depth == 0 => {
                let (block, after) = (&lines[..index], &lines[index + 1..]);
                return match otherwise {
                    Some(at) => (&block[..at], &block[at + 1..], after),
                    None => (block, &[], after),
                };
            }
            Some("end") => depth -= 1,
            Some("else") | None => {}
            Some(_) => depth += 1,
        }
    }
    (lines, &[], &[])
}

/// A line with the words that some scopes know replaced.
fn replace_words(line: &str, scopes: &[&Scope], out: &mut String) {
    for run in line.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let word = run.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let is_capital = word.starts_with(|c: char| c.is_ascii_uppercase());
        match is_capital.then(|| value(scopes, word)).flatten() {
            Some(Value::Word(known)) => out.extend([known, &run[word.len()..]]),
            _ => out.push_str(run),
        }
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_there_once_several_times_or_not() {
        let item = |word: &str, is_last| Scope::default().word("ITEM", word).flag("LAST", is_last);
        let scope = Scope::default()
            .flag("YES", true)
            .flag("NO", false)
            .word("WORD", "wide")
            .list("ITEMS", [item("a", false), item("b", true)])
            .list("NONE", []);
        let template = "
WORD, x_WORD_1 but not WORDS or KNOWN
//# if NO
no
//# if YES
neither
//# else
nor
//# end
//# else
yes
//# end
//# for ITEMS
    //# if not LAST
    ITEM_WORD;
    //# else
    last ITEM
    //# end
//# end
//# if NONE
//# for ITEMS
no
//# end
//# end
behind";
        let expected =
            "\nwide, x_wide_1 but not WORDS or KNOWN\nyes\n    a_wide;\n    last b\nbehind\n";
        assert_eq!(scope.render(template), expected);
    }
}
