//! Python's two ways of formatting: `'%s' % ..` and `'{}'.format(..)`.

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, State, Value};

use super::python::{self, fail, is_dict, is_float, is_tuple, type_name};

/// The widest field, and the most digits.
const WIDEST: usize = 10_000;

/// How a value is to look: `[[fill]align][sign][#][0][width][grouping][.precision][type]`.
#[derive(Debug, Clone, Default)]
struct Look {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn number_in(text: &str, what: &str) -> Result<usize, Error> {
    let number = text
        .parse::<usize>()
        .ok()
        .filter(|number| *number <= WIDEST);
    number.ok_or_else(|| fail(format!("a {what} above {WIDEST} is not supported")))
}

impl Look {
    /// Reads the part of a field behind its colon.
    fn read(spec: &str) -> Result<Self, Error> {
        let bad = || fail(format!("`{spec}` is no format"));
        let mut look = Self::default();
        let chars: Vec<char> = spec.chars().collect();
        let mut at = 0;
        let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
        if is_align(chars.get(1)) {
            look.fill = chars.first().copied();
            look.align = chars.get(1).copied();
            at = 2;
        } else if is_align(chars.first()) {
            look.align = chars.first().copied();
            at = 1;
        }
        let mut take = |set: &str| {
            let c = chars.get(at).copied().filter(|c| set.contains(*c));
            at += usize::from(c.is_some());
            c
        };
        look.sign = take("+- ");
        look.alternate = take("#").is_some();
        look.zero = take("0").is_some();
        let mut digits = String::new();
        while let Some(digit) = take("0123456789") {
            digits.push(digit);
        }
        if !digits.is_empty() {
            look.width = number_in(&digits, "width")?;
        }
        look.grouping = take(",_");
        if take(".").is_some() {
            let mut digits = String::new();
            while let Some(digit) = take("0123456789") {
                digits.push(digit);
            }
            if digits.is_empty() {
                return Err(bad());
            }
            look.precision = Some(number_in(&digits, "precision")?);
        }
        look.kind = take("bcdeEfFgGnosxX%");
        if at < chars.len() {
            return Err(bad());
        }
        Ok(look)
    }

    /// A text filled up to the width.
    fn pad(&self, sign: &str, body: &str, default: char) -> String {
        let align = self.align.unwrap_or(if self.zero { '=' } else { default });
        let fill = self.fill.unwrap_or(if self.zero { '0' } else { ' ' });
        let length = sign.chars().count() + body.chars().count();
        let missing = self.width.saturating_sub(length);
        let left = match align {
            '<' => 0,
            '^' => missing / 2,
            _ => missing,
        };
        let filled = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
        if align == '=' {
            format!("{sign}{}{body}", filled(missing))
        } else {
            format!("{}{sign}{body}{}", filled(left), filled(missing - left))
        }
    }

    fn sign(&self, negative: bool) -> &'static str {
        match (negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        }
    }

    fn apply(&self, state: &State, value: &Value) -> Result<String, Error> {
        let plain = self.kind.is_none();
        match value.kind() {
            ValueKind::String => match self.kind {
                None | Some('s') if self.sign.is_none() && self.align != Some('=') => {
                    Ok(self.text(value.as_str().unwrap_or_default()))
                }
                _ => Err(self.unfit(value)),
            },
            ValueKind::Bool if plain && self.width == 0 && self.align.is_none() => {
                python::text(state, value)
            }
            ValueKind::Bool => self.integer(i128::from(value.is_true()), value),
            ValueKind::Number if is_float(value) => {
                self.float(f64::try_from(value.clone())?, value)
            }
            ValueKind::Number => match self.kind {
                Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => {
                    self.float(f64::try_from(value.clone())?, value)
                }
                _ => match i128::try_from(value.clone()) {
                    Ok(number) => self.integer(number, value),
                    Err(_) => Err(fail("an integer of more than 38 digits can't be formatted")),
                },
            },
            _ if plain && self.width == 0 && self.align.is_none() && self.precision.is_none() => {
                python::text(state, value)
            }
            _ => Err(self.unfit(value)),
        }
    }

    fn unfit(&self, value: &Value) -> Error {
        let kind = self
            .kind
            .map_or(String::new(), |kind| format!(" with `{kind}`"));
        fail(format!(
            "a value of the type {} can't be formatted{kind}",
            type_name(value)
        ))
    }

    fn text(&self, text: &str) -> String {
        let cut: String = match self.precision {
            Some(most) => text.chars().take(most).collect(),
            None => text.to_owned(),
        };
        let look = Self {
            align: self.align.or(self.zero.then_some('<')),
            ..self.clone()
        };
        look.pad("", &cut, '<')
    }

    fn integer(&self, number: i128, value: &Value) -> Result<String, Error> {
        if self.precision.is_some() {
            return Err(self.unfit(value));
        }
        let size = number.unsigned_abs();
        let (prefix, body, group) = match self.kind {
            None | Some('d' | 'n') => ("", size.to_string(), 3),
            Some('b') => ("0b", format!("{size:b}"), 4),
            Some('o') => ("0o", format!("{size:o}"), 4),
            Some('x') => ("0x", format!("{size:x}"), 4),
            Some('X') => ("0X", format!("{size:X}"), 4),
            Some('c') => {
                let c = u32::try_from(number).ok().and_then(char::from_u32);
                let c = c.ok_or_else(|| self.unfit(value))?;
                return Ok(self.pad("", &c.to_string(), '<'));
            }
            _ => return Err(self.unfit(value)),
        };
        let prefix = if self.alternate { prefix } else { "" };
        let sign = format!("{}{prefix}", self.sign(number < 0));
        Ok(self.pad(&sign, &self.grouped(&sign, &body, group), '>'))
    }

    /// Digits in groups; leading zeros are grouped as well.
    fn grouped(&self, sign: &str, digits: &str, size: usize) -> String {
        let Some(between) = self.grouping else {
            return digits.to_owned();
        };
        let (whole, rest) =
            digits.split_at(digits.find(['.', 'e', 'E', '%']).unwrap_or(digits.len()));
        let mut whole = whole.to_owned();
        loop {
            let mut grouped = String::new();
            for (index, digit) in whole.chars().enumerate() {
                if index > 0 && (whole.len() - index).is_multiple_of(size) {
                    grouped.push(between);
                }
                grouped.push(digit);
            }
            let zeros = self.zero && self.align.is_none();
            if !zeros || sign.len() + grouped.len() + rest.len() >= self.width {
                return grouped + rest;
            }
            whole.insert(0, '0');
        }
    }

    fn float(&self, number: f64, value: &Value) -> Result<String, Error> {
        let size = number.abs();
        let upper = matches!(self.kind, Some('E' | 'F' | 'G'));
        let body = if size.is_finite() {
            match self.kind {
                None if self.precision.is_none() => python::float(size),
                None => {
                    // As `g`, but with a point in it.
                    general(size, self.precision.unwrap_or(6), self.alternate, true)
                }
                Some('f' | 'F') => format!("{size:.*}", self.precision.unwrap_or(6)),
                Some('e' | 'E') => exponent(size, self.precision.unwrap_or(6)),
                Some('g' | 'G' | 'n') => {
                    general(size, self.precision.unwrap_or(6), self.alternate, false)
                }
                Some('%') => format!("{:.*}%", self.precision.unwrap_or(6), size * 100.0),
                _ => return Err(self.unfit(value)),
            }
        } else {
            python::float(size)
        };
        let body = if upper { body.to_uppercase() } else { body };
        let sign = self.sign(number.is_sign_negative() && !number.is_nan());
        Ok(self.pad(sign, &self.grouped(sign, &body, 3), '>'))
    }
}

/// `1.234560e+04`.
fn exponent(number: f64, precision: usize) -> String {
    let text = format!("{number:.precision$e}");
    let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, power) = power
        .strip_prefix('-')
        .map_or(('+', power), |power| ('-', power));
    format!("{digits}e{sign}{power:0>2}")
}

/// The shorter of a fixed and an exponential form, without zeros at its end.
fn general(number: f64, precision: usize, alternate: bool, point: bool) -> String {
    let precision = precision.max(1);
    let scientific = exponent(number, precision - 1);
    let power: i64 = scientific
        .split_once('e')
        .and_then(|(_, power)| power.parse().ok())
        .unwrap_or(0);
    let most = precision as i64 - i64::from(point);
    let fixed = power >= -4 && power < most.max(i64::from(point));
    let text = if fixed {
        let places = (precision as i64 - 1 - power).max(0) as usize;
        format!("{number:.places$}")
    } else {
        scientific
    };
    if alternate {
        return text;
    }
    let (digits, power) = text.split_at(text.find('e').unwrap_or(text.len()));
    let digits = if digits.contains('.') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    };
    let point = if point && fixed && !digits.contains('.') {
        ".0"
    } else {
        ""
    };
    format!("{digits}{point}{power}")
}

/// Python's `format % arguments`: a tuple holds several arguments, anything else is one.
pub(super) fn percent(state: &State, format: &str, arguments: &Value) -> Result<Value, Error> {
    let items: Vec<Value> = if arguments.is_tuple() {
        arguments.try_iter()?.collect()
    } else {
        vec![arguments.clone()]
    };
    let mut items = items.into_iter();
    let mut used_names = false;
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let mut named = None;
        if let Some(inner) = rest.strip_prefix('(') {
            let end = inner
                .find(')')
                .ok_or_else(|| fail("a `%(` has no end in the format"))?;
            if !is_dict(arguments) {
                return Err(fail("a format with names takes a dict"));
            }
            let key = Value::from(&inner[..end]);
            let value = arguments.get_item(&key)?;
            if value.is_undefined() {
                return Err(fail(format!(
                    "the format asks for `{}`, which is not given",
                    &inner[..end]
                )));
            }
            named = Some(value);
            used_names = true;
            rest = &inner[end + 1..];
        }
        let mut next = || {
            items
                .next()
                .ok_or_else(|| fail("not enough arguments for the format"))
        };
        let mut look = Look::default();
        while let Some(flag) = rest.chars().next().filter(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => look.align = Some('<'),
                '#' => look.alternate = true,
                '0' => look.zero = true,
                // A plus outweighs a space.
                sign if look.sign != Some('+') => look.sign = Some(sign),
                _ => {}
            }
            rest = &rest[1..];
        }
        if look.align.is_some() {
            look.zero = false;
        }
        let mut digits = |rest: &mut &str, what: &str| -> Result<Option<usize>, Error> {
            if let Some(after) = rest.strip_prefix('*') {
                *rest = after;
                let value = next()?;
                let number = value.as_usize().filter(|number| *number <= WIDEST);
                return number
                    .map(Some)
                    .ok_or_else(|| fail(format!("a {what} above {WIDEST} is not supported")));
            }
            let end = rest
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(rest.len());
            let (text, after) = rest.split_at(end);
            *rest = after;
            (!text.is_empty())
                .then(|| number_in(text, what))
                .transpose()
        };
        look.width = digits(&mut rest, "width")?.unwrap_or(0);
        if let Some(after) = rest.strip_prefix('.') {
            rest = after;
            look.precision = Some(digits(&mut rest, "precision")?.unwrap_or(0));
        }
        rest = rest.trim_start_matches(['h', 'l', 'L']);
        let kind = rest
            .chars()
            .next()
            .ok_or_else(|| fail("the format ends within a `%`"))?;
        rest = &rest[kind.len_utf8()..];
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => items
                .next()
                .ok_or_else(|| fail("not enough arguments for the format"))?,
        };
        out.push_str(&conversion(state, &look, kind, &value)?);
        state.consume_fuel((out.len() / 4096) as u64)?;
    }
    out.push_str(rest);
    // Python does not complain of one argument that could be indexed.
    let indexed = !is_tuple(arguments)
        && matches!(
            arguments.kind(),
            ValueKind::Undefined | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map
        );
    if items.next().is_some() && !used_names && !indexed {
        return Err(fail("more arguments than the format takes"));
    }
    Ok(Value::from(out))
}

fn conversion(state: &State, look: &Look, kind: char, value: &Value) -> Result<String, Error> {
    let mut look = Look {
        // Texts stand at the right there.
        align: look.align.or_else(|| (!look.zero).then_some('>')),
        kind: Some(kind),
        ..look.clone()
    };
    let number = matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    match kind {
        's' | 'r' | 'a' => {
            let text = if kind == 's' {
                python::text(state, value)?
            } else {
                python::repr(state, value)?
            };
            let text = if kind == 'a' && !text.is_ascii() {
                return Err(fail("`%a` of letters beyond ASCII is not supported"));
            } else {
                text
            };
            look.zero = false;
            look.align = look.align.or(Some('>'));
            Ok(look.text(&text))
        }
        'c' => match (value.as_str(), value.as_i64()) {
            (Some(text), _) if text.chars().count() == 1 => Ok(look.text(text)),
            (None, Some(_)) => {
                look.precision = None;
                look.apply(state, value)
            }
            _ => Err(look.unfit(value)),
        },
        'd' | 'i' | 'u' if number => {
            look.kind = Some('d');
            let whole = if is_float(value) {
                let float = f64::try_from(value.clone())?.trunc();
                if !float.is_finite() || float.abs() > 1e38 {
                    return Err(look.unfit(value));
                }
                Value::from(float as i128)
            } else {
                value.clone()
            };
            digits(&look, state, &whole)
        }
        'x' | 'X' | 'o' if number && !is_float(value) => digits(&look, state, value),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' if number => {
            let float = f64::try_from(value.clone())
                .or_else(|_| Ok::<f64, Error>(if value.is_true() { 1.0 } else { 0.0 }))?;
            look.float(float, value)
        }
        _ => Err(look.unfit(value)),
    }
}

/// An integer, for which a precision is the fewest digits.
fn digits(look: &Look, state: &State, value: &Value) -> Result<String, Error> {
    let Some(fewest) = look.precision else {
        return look.apply(state, value);
    };
    let bare = Look {
        kind: look.kind,
        ..Look::default()
    };
    let text = bare.apply(state, value)?;
    let (negative, text) = text
        .strip_prefix('-')
        .map_or((false, text.as_str()), |rest| (true, rest));
    Ok(look.pad(look.sign(negative), &format!("{text:0>fewest$}"), '>'))
}

/// Python's `str.format`.
pub(super) fn braces(state: &State, format: &str, args: &[Value]) -> Result<Value, Error> {
    let (by_place, by_name): (Rest<Value>, Kwargs) = from_args(args)?;
    let mut fields = Fields {
        state,
        by_place: &by_place,
        by_name: &by_name,
        next: 0,
    };
    Ok(Value::from(fields.text(format, 0)?))
}

/// The arguments of `str.format`.
struct Fields<'a> {
    state: &'a State<'a, 'a>,
    by_place: &'a [Value],
    by_name: &'a Kwargs,
    next: usize,
}

impl Fields<'_> {
    fn text(&mut self, format: &str, depth: usize) -> Result<String, Error> {
        let mut out = String::new();
        let mut rest = format;
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                out.push_str(brace);
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err(fail("a `}` stands alone in the format"));
            }
            if depth > 1 {
                return Err(fail("the format is nested too deeply"));
            }
            let end = closing(rest).ok_or_else(|| fail("a `{` has no end in the format"))?;
            let field = &rest[..end];
            rest = &rest[end + 1..];
            out.push_str(&self.field(field, depth)?);
            self.state.consume_fuel((out.len() / 4096) as u64)?;
        }
        out.push_str(rest);
        Ok(out)
    }

    fn field(&mut self, field: &str, depth: usize) -> Result<String, Error> {
        let (name, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = name.split_once('!').unwrap_or((name, ""));
        let value = self.value(name)?;
        let value = match conversion {
            "" => value,
            "s" => Value::from(python::text(self.state, &value)?),
            "r" => Value::from(python::repr(self.state, &value)?),
            other => return Err(fail(format!("`!{other}` is no conversion"))),
        };
        let spec = self.text(spec, depth + 1)?;
        if spec.is_empty() {
            return python::text(self.state, &value);
        }
        Look::read(&spec)?.apply(self.state, &value)
    }

    /// The value that a field names: `0`, `name`, `name.attribute`, `name[key]`.
    fn value(&mut self, name: &str) -> Result<Value, Error> {
        let end = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut path) = name.split_at(end);
        let mut value = if first.is_empty() {
            self.next += 1;
            self.by_place.get(self.next - 1).cloned()
        } else if first.bytes().all(|byte| byte.is_ascii_digit()) {
            first
                .parse::<usize>()
                .ok()
                .and_then(|index| self.by_place.get(index).cloned())
        } else {
            self.by_name.peek::<Value>(first).ok()
        }
        .ok_or_else(|| fail(format!("the format asks for `{name}`, which is not given")))?;
        while !path.is_empty() {
            if let Some(inner) = path.strip_prefix('[') {
                let end = inner
                    .find(']')
                    .ok_or_else(|| fail("a `[` has no end in the format"))?;
                let key = &inner[..end];
                let key = key
                    .parse::<usize>()
                    .map_or_else(|_| Value::from(key), Value::from);
                value = value.get_item(&key)?;
                path = &inner[end + 1..];
            } else {
                let inner = path.strip_prefix('.').unwrap_or(path);
                let end = inner.find(['.', '[']).unwrap_or(inner.len());
                // Attributes of Python's values are none that a template should print; jinja2 finds a dict's entries there.
                value = value.get_attr(&inner[..end])?;
                path = &inner[end..];
            }
        }
        Ok(value)
    }
}

/// Where the brace closes that was open before `rest`.
fn closing(rest: &str) -> Option<usize> {
    let mut open = 0;
    for (at, byte) in rest.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' if open == 0 => return Some(at),
            b'}' => open -= 1,
            _ => {}
        }
    }
    None
}
