//! Tests of `expressions`.

use super::*;

fn written(code: &str) -> String {
    let mut reader = Reader::new(code).unwrap();
    let out = reader.tuple(true).unwrap();
    out + reader.end().unwrap()
}

#[test]
fn what_the_engine_computes_as_python_stays() {
    for code in [
        " a.b[1:-1].c(x, y=2, *z) | d('e') | f ",
        "a if b else c if d else e",
        "not a in b and c is not none or d is divisibleby 3",
        "- 1 | abs + 2 ** 3 // 4",
        "{'a': [1, 2.5e-3, (3,), ()], 'b': {}}[ 'a' ]",
        "'it\\'s \\u00e9' \"b\"",
        "a == b != c < d",
        "m.content.split('x')[-1]\n  .strip()",
        "loop.index",
        "x is in [1]",
        "a.0.b",
    ] {
        assert_eq!(written(code), code);
    }
}

#[test]
fn the_rest_becomes_calls() {
    for (code, expected) in [
        ("a % b % c", " __modulo( __modulo(a , b) , c)"),
        ("x ~ 1 ~\n y", " __concat(x , 1 ,\n y)"),
        ("a <= b", " __less_or_equal(a,  b)"),
        ("+1", " __positive(1)"),
        ("a.items", " __attribute(a,'items')"),
        ("a.items.b | c", " __attribute(a,'items').b | c"),
        ("1, 2", " (1, 2)"),
        ("a[1, 2]", "a[ (1, 2)]"),
        ("'\\a\\v\\U0001F600'", "'\\u0007\\u000b😀'"),
        (
            "f(a % b, c=d ~ e)",
            "f( __modulo(a , b), c= __concat(d , e))",
        ),
    ] {
        assert_eq!(written(code), expected);
    }
}

#[test]
fn what_is_no_expression_is_left_to_the_engine() {
    for code in [
        "", "a b", "(", "a.", "a[", "'a", "{1}", "a if", "*", "a..b", "f(a b)", "not",
    ] {
        let read = Reader::new(code).and_then(|mut reader| {
            reader.tuple(true)?;
            reader.end().map(|_| ())
        });
        assert!(read.is_err(), "{code}");
    }
    let deep = format!("{}1{}", "(".repeat(5000), ")".repeat(5000));
    assert!(Reader::new(&deep).unwrap().tuple(true).is_err());
}
