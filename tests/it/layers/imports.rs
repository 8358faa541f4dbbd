//! Which file of a crate uses which: `use` declarations and inline paths, followed through modules and re-exports to the file that
//! defines the item.
//!
//! It is a reader of tokens and no compiler: methods and what macros make are not seen, and neither is code under `#[cfg(test)]`.

use std::collections::{BTreeMap, BTreeSet};

use super::tokens::{Token, tokens};

/// The files of a crate as modules, by the path of the module (`engine::run`; the root is empty).
pub(super) struct Imports {
    modules: BTreeMap<Vec<String>, Module>,
}

#[derive(Default)]
struct Module {
    /// The file, from the folder of the crate's root.
    file: String,
    /// The names of its items and child modules.
    items: BTreeSet<String>,
    children: BTreeSet<String>,
    /// What `use` brings in: the name here, and the path.
    uses: Vec<(String, Vec<String>)>,
    /// Modules of which everything is brought in.
    globs: Vec<Vec<String>>,
    /// Every path, those of `use` as well.
    paths: Vec<Vec<String>>,
}

/// What a path leads to.
#[derive(Clone, PartialEq, Debug)]
enum Target {
    Module(Vec<String>),
    /// An item of a module.
    Item(Vec<String>),
}

/// How far re-exports are followed.
const FAR: usize = 16;

impl Imports {
    /// Reads sources by file: `lib.rs`, `engine/mod.rs`, `engine/run.rs`.
    pub(super) fn read<'a>(sources: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut modules = BTreeMap::new();
        for (file, text) in sources {
            let mut path: Vec<String> = file
                .trim_end_matches(".rs")
                .split('/')
                .map(str::to_owned)
                .collect();
            if ["lib", "mod"].contains(&path.last().map_or("", String::as_str)) {
                path.pop();
            }
            let mut module = Module {
                file: file.to_owned(),
                ..Module::default()
            };
            module.read(&tokens(text));
            modules.insert(path, module);
        }
        // What only tests declare is not there.
        let declared = |path: &[String]| {
            (0..path.len()).all(|above| {
                let above = modules.get(&path[..above]).zip(path.get(above));
                above.is_some_and(|(module, name)| module.children.contains(name))
            })
        };
        let tests: Vec<_> = modules
            .keys()
            .filter(|path| !declared(path))
            .cloned()
            .collect();
        for path in tests {
            modules.remove(&path);
        }
        Self { modules }
    }

    /// Every pair of files of which the first uses an item of the second, with the names of the items.
    pub(super) fn edges(&self) -> BTreeMap<&str, BTreeMap<&str, BTreeSet<String>>> {
        let mut edges: BTreeMap<&str, BTreeMap<&str, BTreeSet<String>>> = BTreeMap::new();
        for (at, module) in &self.modules {
            let of_file = edges.entry(&module.file).or_default();
            for path in &module.paths {
                if let Some(Target::Item(found)) = self.resolve(at, path, FAR)
                    && found != *at
                    && let Some(other) = self.modules.get(&found)
                {
                    let names = of_file.entry(other.file.as_str()).or_default();
                    names.insert(path.join("::"));
                }
            }
            for glob in &module.globs {
                if let Some(Target::Module(found)) = self.resolve(at, glob, FAR)
                    && found != *at
                    && let Some(other) = self.modules.get(&found)
                {
                    let names = of_file.entry(other.file.as_str()).or_default();
                    names.insert(format!("{}::*", glob.join("::")));
                }
            }
        }
        edges
    }

    /// The crates of a list that a file uses, by their names in paths.
    pub(super) fn crates<'a>(&self, known: &'a [String]) -> BTreeMap<&str, BTreeSet<&'a str>> {
        let mut used: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (at, module) in &self.modules {
            for path in module.paths.iter().chain(&module.globs) {
                if let Some(first) = path.first()
                    && let Some(known) = known.iter().find(|known| *known == first)
                    && !self.is_local(at, first)
                {
                    used.entry(&module.file).or_default().insert(known);
                }
            }
        }
        used
    }

    /// Whether a name means something of the crate itself.
    fn is_local(&self, at: &[String], name: &str) -> bool {
        let Some(module) = self.modules.get(at) else {
            return false;
        };
        let own = |(used, path): &(String, Vec<String>)| {
            used == name && path.first().is_some_and(|first| first != name)
        };
        module.children.contains(name) || module.uses.iter().any(own)
    }

    /// What a path that stands in the module `at` leads to; nothing for what is no path of this crate.
    fn resolve(&self, at: &[String], path: &[String], far: usize) -> Option<Target> {
        let far = far.checked_sub(1)?;
        let mut at = at.to_vec();
        let mut rest = path.iter().peekable();
        match rest.peek()?.as_str() {
            "crate" => {
                at.clear();
                rest.next();
            }
            "self" => _ = rest.next(),
            "super" => {
                while rest.next_if(|step| *step == "super").is_some() {
                    at.pop()?;
                }
            }
            name => {
                let module = self.modules.get(&at)?;
                let own = module.children.contains(name) || module.items.contains(name);
                let brought = module.uses.iter().any(|(used, path)| {
                    // `use name::..` of another crate brings in itself.
                    used == name && path.first().is_some_and(|first| first != name)
                });
                let through_glob = || self.through_glob(&at, name, far).is_some();
                if !own && !brought && !through_glob() {
                    return None;
                }
            }
        }
        let mut found = Target::Module(at);
        while let Some(name) = rest.next() {
            let Target::Module(module) = &found else {
                break;
            };
            found = self.child(module, name, rest.peek().is_none(), far)?;
        }
        Some(found)
    }

    /// What a name of a module is. At the end of a path an item goes before a module of the same name.
    fn child(&self, at: &[String], name: &str, last: bool, far: usize) -> Option<Target> {
        let module = self.modules.get(at)?;
        let below = [at, &[name.to_owned()]].concat();
        let is_module = self.modules.contains_key(&below);
        if is_module && !last {
            return Some(Target::Module(below));
        }
        for (used, path) in &module.uses {
            if used == name && path.last().is_some() {
                let same = path.len() == 1 && path[0] == *name;
                if !same && let Some(found) = self.resolve(at, path, far) {
                    return Some(found);
                }
            }
        }
        if is_module {
            return Some(Target::Module(below));
        }
        if module.items.contains(name) {
            return Some(Target::Item(at.to_vec()));
        }
        let found = self.through_glob(at, name, far);
        Some(found.unwrap_or_else(|| Target::Item(at.to_vec())))
    }

    fn through_glob(&self, at: &[String], name: &str, far: usize) -> Option<Target> {
        let far = far.checked_sub(1)?;
        let module = self.modules.get(at)?;
        module.globs.iter().find_map(|glob| {
            let Target::Module(from) = self.resolve(at, glob, far)? else {
                return None;
            };
            let other = self.modules.get(&from)?;
            let has = other.items.contains(name)
                || other.children.contains(name)
                || other.uses.iter().any(|(used, _)| used == name);
            has.then(|| self.child(&from, name, true, far)).flatten()
        })
    }
}

/// Words before the name of an item.
const ITEMS: [&str; 8] = [
    "fn", "struct", "enum", "trait", "const", "static", "type", "union",
];

impl Module {
    fn read(&mut self, tokens: &[Token<'_>]) {
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let Token::Word(word) = *token else {
                at += 1;
                continue;
            };
            let next = tokens.get(at + 1);
            match (word, next) {
                ("use", Some(_)) => {
                    at += 1;
                    self.tree(tokens, &mut at, Vec::new());
                }
                ("mod", Some(Token::Word(name))) => {
                    self.children.insert((*name).to_owned());
                    at += 2;
                }
                ("macro_rules", Some(Token::Mark('!'))) => at += 3,
                (item, Some(Token::Word(name))) if ITEMS.contains(&item) => {
                    self.items.insert((*name).to_owned());
                    at += 2;
                }
                _ => {
                    let path = path(tokens, &mut at);
                    if path.len() > 1 {
                        self.paths.push(path);
                    }
                }
            }
        }
    }

    /// One tree of a `use` declaration below a path.
    fn tree(&mut self, tokens: &[Token<'_>], at: &mut usize, mut above: Vec<String>) {
        // `use ::name`.
        if tokens.get(*at) == Some(&Token::Separator) {
            *at += 1;
        }
        loop {
            match tokens.get(*at) {
                Some(Token::Mark('{')) => {
                    *at += 1;
                    while !matches!(tokens.get(*at), None | Some(Token::Mark('}'))) {
                        self.tree(tokens, at, above.clone());
                        if tokens.get(*at) == Some(&Token::Mark(',')) {
                            *at += 1;
                        }
                    }
                    *at += 1;
                    return;
                }
                Some(Token::Mark('*')) => {
                    *at += 1;
                    self.globs.push(above);
                    return;
                }
                Some(Token::Word(name)) => {
                    *at += 1;
                    if *name != "self" || above.is_empty() {
                        above.push((*name).to_owned());
                    }
                    if tokens.get(*at) == Some(&Token::Separator) {
                        *at += 1;
                        continue;
                    }
                    let mut name = above.last().cloned().unwrap_or_default();
                    if tokens.get(*at) == Some(&Token::Word("as"))
                        && let Some(Token::Word(other)) = tokens.get(*at + 1)
                    {
                        name = (*other).to_owned();
                        *at += 2;
                    }
                    self.paths.push(above.clone());
                    self.uses.push((name, above));
                    return;
                }
                _ => return,
            }
        }
    }
}

/// The path that begins at a word.
fn path(tokens: &[Token<'_>], at: &mut usize) -> Vec<String> {
    let mut path = Vec::new();
    while let Some(Token::Word(word)) = tokens.get(*at) {
        path.push((*word).to_owned());
        *at += 1;
        if tokens.get(*at) != Some(&Token::Separator) {
            break;
        }
        *at += 1;
    }
    path
}
