//! Parses the expressions of a template by jinja2's grammar and rewrites them for the template engine. Operators that the engine
//! evaluates differently from Python become calls of our own functions. The entry points are [`Reader`] and the names of these functions.

mod tokens;

use tokens::{Kind, Read, Token, literal, tokens};

pub(super) use tokens::Unread;

/// `%`, which also formats texts.
pub(super) const MODULO: &str = "__modulo";
/// `~`, which converts its operands to text as Python does.
pub(super) const CONCAT: &str = "__concat";
/// A plus before a number.
pub(super) const POSITIVE: &str = "__positive";
/// Access to an attribute that may be a method of a Python value.
pub(super) const ATTRIBUTE: &str = "__attribute";
/// `<`, `<=`, `>` and `>=`, which in Python need operands of comparable types.
pub(super) const ORDERS: [(&str, &str); 4] = [
    ("<", "__less"),
    ("<=", "__less_or_equal"),
    (">", "__greater"),
    (">=", "__greater_or_equal"),
];

/// The methods of Python's `dict`. Entries of a dict with these names can only be read with `[..]`.
pub(super) const DICT_METHODS: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];
/// The methods of Python's `list` and `str` that `dict` does not have.
pub(super) const OTHER_METHODS: [&str; 33] = [
    "append",
    "capitalize",
    "casefold",
    "count",
    "endswith",
    "extend",
    "find",
    "format",
    "index",
    "insert",
    "isalnum",
    "isalpha",
    "isdigit",
    "islower",
    "isspace",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "remove",
    "replace",
    "reverse",
    "rsplit",
    "rstrip",
    "sort",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
];

/// Recorded among the names for an escape like `\N{DASH}`, which is not supported.
pub(super) const CHARACTER_NAME: &str = "\\N";

/// The deepest nesting of brackets that is parsed. The engine's own limit is lower.
const DEEPEST: usize = 160;

/// Reads expressions out of the code of a tag.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    depth: usize,
    /// The variables that were read.
    pub(super) names: Vec<&'a str>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(code: &'a str) -> Read<Self> {
        Ok(Self {
            tokens: tokens(code)?,
            at: 0,
            depth: 0,
            names: Vec::new(),
        })
    }

    fn token(&self) -> Token<'a> {
        self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn after(&self, ahead: usize) -> Token<'a> {
        self.tokens[(self.at + ahead).min(self.tokens.len() - 1)]
    }

    fn take(&mut self) -> Token<'a> {
        let token = self.token();
        self.at += 1;
        token
    }

    /// Whether the next token is this punctuation mark or word.
    pub(super) fn is(&self, text: &str) -> bool {
        let token = self.token();
        matches!(token.kind, Kind::Mark | Kind::Name) && token.text == text
    }

    /// Takes a mark or a word, with the white space before it.
    pub(super) fn expect(&mut self, text: &str) -> Read<&'a str> {
        if self.is(text) {
            Ok(self.take().spaced)
        } else {
            Err(Unread)
        }
    }

    /// Takes any name, with and without the white space before it.
    pub(super) fn name(&mut self) -> Read<(&'a str, &'a str)> {
        let token = self.token();
        if token.kind != Kind::Name {
            return Err(Unread);
        }
        self.at += 1;
        Ok((token.spaced, token.text))
    }

    /// The white space at the end, if nothing else is left.
    pub(super) fn end(&self) -> Read<&'a str> {
        let token = self.token();
        if token.kind == Kind::End {
            Ok(token.spaced)
        } else {
            Err(Unread)
        }
    }

    /// Everything up to a mark outside of brackets, as it stands.
    pub(super) fn up_to(&mut self, mark: &str) -> Read<String> {
        let mut out = String::new();
        let mut depth = 0_usize;
        loop {
            let token = self.token();
            match token.text {
                _ if token.kind == Kind::End => return Err(Unread),
                text if depth == 0 && text == mark && token.kind != Kind::Text => return Ok(out),
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            out.push_str(token.spaced);
            self.at += 1;
        }
    }

    /// Parses a comma-separated list of expressions, which is a tuple even without brackets.
    pub(super) fn tuple(&mut self, ternary: bool) -> Read<String> {
        let first = self.expression(ternary)?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut out = format!(" ({first}");
        while self.is(",") {
            out.push_str(self.take().spaced);
            if self.token().kind == Kind::End || [")", "]", "="].iter().any(|mark| self.is(mark)) {
                break;
            }
            out.push_str(&self.expression(ternary)?);
        }
        out.push(')');
        Ok(out)
    }

    /// One expression; with `ternary` it may have `if` and `else`.
    pub(super) fn expression(&mut self, ternary: bool) -> Read<String> {
        let mut out = self.either()?;
        while ternary && self.is("if") {
            out.push_str(self.take().spaced);
            out.push_str(&self.either()?);
            if self.is("else") {
                out.push_str(self.take().spaced);
                out.push_str(&self.expression(true)?);
            }
        }
        Ok(out)
    }

    fn either(&mut self) -> Read<String> {
        let mut out = self.both()?;
        while self.is("or") {
            out.push_str(self.take().spaced);
            out.push_str(&self.both()?);
        }
        Ok(out)
    }

    fn both(&mut self) -> Read<String> {
        let mut out = self.negated()?;
        while self.is("and") {
            out.push_str(self.take().spaced);
            out.push_str(&self.negated()?);
        }
        Ok(out)
    }

    fn negated(&mut self) -> Read<String> {
        if self.is("not") && self.after(1).text != "in" {
            let not = self.take().spaced;
            return Ok(format!("{not}{}", self.negated()?));
        }
        self.compared()
    }

    fn compared(&mut self) -> Read<String> {
        let mut operands = vec![self.sum()?];
        let mut operators: Vec<String> = Vec::new();
        loop {
            let mark = self.token();
            let compares = mark.kind == Kind::Mark
                && matches!(mark.text, "==" | "!=" | "<" | "<=" | ">" | ">=");
            if compares || self.is("in") {
                operators.push(self.take().spaced.to_owned());
            } else if self.is("not") && self.after(1).text == "in" {
                let not = self.take().spaced;
                operators.push(format!("{not}{}", self.take().spaced));
            } else {
                break;
            }
            operands.push(self.sum()?);
        }
        if let ([operator], [a, b]) = (operators.as_slice(), operands.as_slice())
            && let Some((_, function)) = ORDERS.iter().find(|(mark, _)| *mark == operator.trim())
        {
            let space = operator.trim_end().trim_end_matches(['<', '>', '=']);
            return Ok(format!(" {function}({a},{space}{b})"));
        }
        let mut operands = operands.into_iter();
        let mut out = operands.next().unwrap_or_default();
        for (operator, operand) in operators.iter().zip(operands) {
            out.push_str(operator);
            out.push_str(&operand);
        }
        Ok(out)
    }

    fn sum(&mut self) -> Read<String> {
        let mut out = self.joined()?;
        while self.is("+") || self.is("-") {
            out.push_str(self.take().spaced);
            out.push_str(&self.joined()?);
        }
        Ok(out)
    }

    fn joined(&mut self) -> Read<String> {
        let first = self.product()?;
        if !self.is("~") {
            return Ok(first);
        }
        let mut out = format!(" {CONCAT}({first}");
        while self.is("~") {
            out.push_str(&self.take().spaced.replace('~', ","));
            out.push_str(&self.product()?);
        }
        out.push(')');
        Ok(out)
    }

    fn product(&mut self) -> Read<String> {
        let mut out = self.power()?;
        while ["*", "/", "//", "%"].iter().any(|mark| self.is(mark)) {
            let mark = self.take();
            let factor = self.power()?;
            if mark.text == "%" {
                out = format!(" {MODULO}({out}{}{factor})", mark.spaced.replace('%', ","));
            } else {
                out.push_str(mark.spaced);
                out.push_str(&factor);
            }
        }
        Ok(out)
    }

    fn power(&mut self) -> Read<String> {
        let mut out = self.signed(true)?;
        while self.is("**") {
            out.push_str(self.take().spaced);
            out.push_str(&self.signed(true)?);
        }
        Ok(out)
    }

    fn signed(&mut self, filters: bool) -> Read<String> {
        let mut out = if self.is("-") {
            let minus = self.take().spaced;
            format!("{minus}{}", self.signed(false)?)
        } else if self.is("+") {
            let plus = self.take().spaced.replace('+', "");
            format!("{plus} {POSITIVE}({})", self.signed(false)?)
        } else {
            self.primary()?
        };
        out = self.postfix(out)?;
        if filters {
            self.filtered(&mut out)?;
        }
        Ok(out)
    }

    /// Filters and tests behind a value.
    fn filtered(&mut self, out: &mut String) -> Read<()> {
        loop {
            if self.is("|") {
                out.push_str(self.take().spaced);
                out.push_str(&self.filter_name()?);
            } else if self.is("is") {
                out.push_str(self.take().spaced);
                out.push_str(&self.test()?);
            } else {
                return Ok(());
            }
            if self.is("(") {
                out.push_str(&self.arguments()?);
            }
        }
    }

    fn filter_name(&mut self) -> Read<String> {
        let mut out = self.name()?.0.to_owned();
        while self.is(".") {
            out.push_str(self.take().spaced);
            out.push_str(self.name()?.0);
        }
        Ok(out)
    }

    fn test(&mut self) -> Read<String> {
        let mut out = String::new();
        if self.is("not") {
            out.push_str(self.take().spaced);
        }
        out.push_str(&self.filter_name()?);
        let next = self.token();
        let word = next.kind == Kind::Name
            && !matches!(
                next.text,
                "else" | "or" | "and" | "is" | "if" | "in" | "not" | "recursive"
            );
        let value =
            matches!(next.kind, Kind::Text | Kind::Number) || matches!(next.text, "[" | "{");
        if word || (value && next.kind != Kind::End) {
            let argument = self.primary()?;
            out.push_str(&self.postfix(argument)?);
        }
        Ok(out)
    }

    fn postfix(&mut self, mut out: String) -> Read<String> {
        loop {
            if self.is(".") {
                let dot = self.take();
                let part = self.take();
                let method = part.kind == Kind::Name
                    && (DICT_METHODS.contains(&part.text) || OTHER_METHODS.contains(&part.text));
                if method && !self.is("(") && out.trim() != "loop" {
                    out = format!(
                        " {ATTRIBUTE}({out}{}'{}')",
                        dot.spaced.replace('.', ","),
                        part.text
                    );
                } else if matches!(part.kind, Kind::Name | Kind::Number) {
                    out.push_str(dot.spaced);
                    out.push_str(part.spaced);
                } else {
                    return Err(Unread);
                }
            } else if self.is("[") {
                out.push_str(self.take().spaced);
                self.enter()?;
                out.push_str(&self.subscript()?);
                self.depth -= 1;
                out.push_str(self.expect("]")?);
            } else if self.is("(") {
                out.push_str(&self.arguments()?);
            } else {
                return Ok(out);
            }
        }
    }

    fn enter(&mut self) -> Read<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            Err(Unread)
        } else {
            Ok(())
        }
    }

    fn subscript(&mut self) -> Read<String> {
        let mut out = String::new();
        let mut slice = false;
        loop {
            if self.is(":") {
                slice = true;
                out.push_str(self.take().spaced);
            } else if self.is("]") {
                return Ok(out);
            } else {
                out.push_str(&if slice {
                    self.expression(true)?
                } else {
                    self.tuple(true)?
                });
                if !self.is(":") && !self.is("]") {
                    return Err(Unread);
                }
            }
        }
    }

    /// What stands between the brackets of a call.
    pub(super) fn arguments(&mut self) -> Read<String> {
        let mut out = self.expect("(")?.to_owned();
        self.enter()?;
        while !self.is(")") {
            if self.is("*") || self.is("**") {
                out.push_str(self.take().spaced);
            } else if self.token().kind == Kind::Name
                && self.after(1).text == "="
                && self.after(1).kind == Kind::Mark
            {
                out.push_str(self.take().spaced);
                out.push_str(self.take().spaced);
            }
            out.push_str(&self.expression(true)?);
            if self.is(",") {
                out.push_str(self.take().spaced);
            } else if !self.is(")") {
                return Err(Unread);
            }
        }
        self.depth -= 1;
        out.push_str(self.take().spaced);
        Ok(out)
    }

    fn primary(&mut self) -> Read<String> {
        let token = self.token();
        match (token.kind, token.text) {
            (Kind::Name, name) => {
                if matches!(name, "if" | "else" | "or" | "and" | "in" | "is" | "not") {
                    return Err(Unread);
                }
                self.names.push(name);
                self.at += 1;
                Ok(token.spaced.to_owned())
            }
            (Kind::Number, _) => {
                self.at += 1;
                Ok(token.spaced.to_owned())
            }
            (Kind::Text, _) => {
                let mut out = String::new();
                while self.token().kind == Kind::Text {
                    let token = self.take();
                    let space = &token.spaced[..token.spaced.len() - token.text.len()];
                    out.push_str(space);
                    if token.text.contains("\\N{") {
                        self.names.push(CHARACTER_NAME);
                    }
                    out.push_str(&literal(token.text)?);
                }
                Ok(out)
            }
            (Kind::Mark, "(") => {
                self.at += 1;
                self.enter()?;
                let mut out = token.spaced.to_owned();
                if !self.is(")") {
                    out.push_str(&self.bracketed(")")?);
                }
                self.depth -= 1;
                out.push_str(self.expect(")")?);
                Ok(out)
            }
            (Kind::Mark, "[") => {
                self.at += 1;
                self.enter()?;
                let out = format!("{}{}", token.spaced, self.bracketed("]")?);
                self.depth -= 1;
                Ok(out + self.expect("]")?)
            }
            (Kind::Mark, "{") => {
                self.at += 1;
                self.enter()?;
                let mut out = token.spaced.to_owned();
                while !self.is("}") {
                    out.push_str(&self.expression(true)?);
                    out.push_str(self.expect(":")?);
                    out.push_str(&self.expression(true)?);
                    if self.is(",") {
                        out.push_str(self.take().spaced);
                    } else if !self.is("}") {
                        return Err(Unread);
                    }
                }
                self.depth -= 1;
                out.push_str(self.take().spaced);
                Ok(out)
            }
            _ => Err(Unread),
        }
    }

    /// Expressions with commas between them, up to a closing bracket.
    fn bracketed(&mut self, close: &str) -> Read<String> {
        let mut out = String::new();
        while !self.is(close) {
            out.push_str(&self.expression(true)?);
            if self.is(",") {
                out.push_str(self.take().spaced);
            } else if !self.is(close) {
                return Err(Unread);
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests;
