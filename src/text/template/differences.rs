//! Where a construct does not print here what it prints by jinja2: refused with a sentence, or in another way for a reason.

/// Constructs that are refused, each with words of its error. jinja2 prints something.
pub(super) const REFUSED: &[(&str, &str)] = &[
    ("{% print 1 %}", "unknown statement print"),
    ("{{ 123456789 | filesizeformat }}", "`filesizeformat`"),
    ("{{ 1000 | filesizeformat }}", "`filesizeformat`"),
    ("{{ 1023 | filesizeformat(true) }}", "`filesizeformat`"),
    ("{{ 0 | filesizeformat }}", "`filesizeformat`"),
    ("{{ huge | int }}", "more than 38 digits"),
    ("{{ people | pprint }}", "takes more than a line"),
    ("{{ numbers | random in numbers }}", "`random`"),
    ("{{ 'see http://a.b/c now' | urlize }}", "`urlize`"),
    (
        "{{ {'a': 1, 'b': none, 'c': '<x>'} | xmlattr }}",
        "`xmlattr`",
    ),
    ("{{ {'a': undef} | xmlattr }}", "`xmlattr`"),
    ("{{ {} | xmlattr }}", "`xmlattr`"),
    ("{{ {'id': 5} | xmlattr(false) }}", "`xmlattr`"),
    ("{{ 'abc'.translate({97: 'x'}) }}", "no method `translate`"),
    ("{{ 'ab'.encode() }}", "no method `encode`"),
    ("{{ 'ab'.encode('utf-8') }}", "no method `encode`"),
    ("{{ 'é'.encode().decode() }}", "no method `encode`"),
    ("{{ 2 ** 200 }}", "unable to calculate"),
    (r"{{ '\N{BULLET}' }}", "write the character"),
    ("{{ lipsum() is string }}", "another text each time"),
    (
        "{% set a = 5 %}{% with a = 1, b = a %}{{ b }}{% endwith %}",
        "use two tags",
    ),
    (
        "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }}",
        "`varargs`",
    ),
    (
        "{% macro m(a) %}{{ a }}{{ varargs | join(',') }}{% endmacro %}{{ m(1, 2, 3) }}",
        "`varargs`",
    ),
    (
        "{% macro m(a) %}{{ kwargs.x }}{{ kwargs | length }}{% endmacro %}{{ m(1, x=2) }}",
        "`kwargs`",
    ),
];

/// Constructs that print here, and fail or print another text by jinja2, with why that is left.
pub(super) const OTHERWISE: &[(&str, &str)] = &[
    (
        "{{ map | items | tojson }}",
        "A list here, an iterator there, which `json` refuses.",
    ),
    (
        "{{ numbers | select('odd') | tojson }}",
        "A list here, an iterator there, which `json` refuses.",
    ),
    (
        "{{ numbers | reverse | tojson }}",
        "A list here, an iterator there, which `json` refuses.",
    ),
    (
        "{{ '{[0]}'.format(numbers) }}",
        "A field without a name, which Python refuses.",
    ),
    ("{{ seven.real }}", "Parts of numbers are not known here."),
    ("{{ half.real }}", "Parts of numbers are not known here."),
    (
        "{{ seven.numerator }}",
        "Parts of numbers are not known here.",
    ),
    ("{{ range(2) == [0, 1] }}", "The engine compares items."),
    (
        "{{ map.keys() == ['b', 'a', 'C'] }}",
        "The engine compares items.",
    ),
    ("{{ 1 in 'a1' }}", "The engine looks for the number's text."),
    ("{{ [1] in map }}", "Python refuses a list as a key."),
    (
        "{{ 'x' if namespace() else 'y' }}",
        "The engine takes an empty namespace for false.",
    ),
    ("{{ none[1:] }}", "The engine cuts nothing out of nothing."),
    (
        "{{ numbers[1.0] }}",
        "The engine takes a whole float for an index.",
    ),
    ("{{ undef[1:] }}", "The engine cuts nothing out of nothing."),
    (
        "{{ self is defined }}",
        "Blocks of other templates are refused, so nobody asks.",
    ),
    (
        "{% macro m(a, b='x') %}{% endmacro %}{{ m.name }}{{ m.arguments }}{{ m.caller }}{{ m.catch_varargs }}{{ m.catch_kwargs }}",
        "What a macro tells of itself.",
    ),
    (
        "{% macro m(x=none) %}{{ x is none }}{% endmacro %}{{ m() }}{{ m(undef) }}",
        "The engine gives an undefined argument its default.",
    ),
];
