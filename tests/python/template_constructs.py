"""Constructs of chat templates for check_templates.py: small sources over a few variables, one feature each."""

# JSON values, as a row of a dataset gives them.
VARIABLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "tools": None,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What's up?\n"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "arguments": {"city": "Köln", "days": 2, "metric": True, "scale": 1.0, "at": None, "tags": ["a", "b"]},
                    },
                }
            ],
        },
        {"role": "tool", "name": "weather", "content": '{"t": 21.5}'},
        {"role": "assistant", "content": "It is 21.5 °C — fine <b>&</b> \"sunny\"."},
    ],
    "text": "The quick brown fox, jumps over the lazy dog",
    "lines": "one\n two\r\nthree\n\nfour",
    "spaces": " \t\u00a0x y\u3000\n",
    "german": "Straße ÄÖÜ ǆ ŉ",
    "empty": "",
    "none": None,
    "yes": True,
    "no": False,
    "zero": 0,
    "seven": 7,
    "minus": -7,
    "half": 0.5,
    "third": 0.3333333333333333,
    "big": 12345678901234567890,
    "huge": 1e300,
    "tiny": 1e-7,
    "million": 1000000.0,
    "exp": 1e16,
    "numbers": [3, 1, 2],
    "mixed": [1, 2.5, True, None, "x", "it's", 'say "hi"', [1], {"k": "v"}],
    "words": ["pear", "Apple", "fig", "apple"],
    "people": [
        {"name": "Ann", "age": 30, "town": {"name": "Ulm"}},
        {"name": "bob", "age": 25, "town": {"name": "Bonn"}},
        {"name": "Cy", "age": 30, "town": {"name": "ulm"}},
    ],
    "map": {"b": 1, "a": 2, "C": 3},
    "nested": {"items": [1, 2], "keys": "k", "get": "g", "list": [{"x": 1}, {"x": 2}]},
    "schema": {"type": "object", "properties": {"p": {"type": "array", "items": {"type": "string"}, "enum": ["a", "b"]}}, "required": ["p"]},
}

TESTS = r"""
none is iterable|tools is iterable|text is iterable|numbers is iterable|map is iterable|seven is iterable|undef is iterable|range(3) is iterable
none is sequence|text is sequence|numbers is sequence|map is sequence|seven is sequence|undef is sequence|(1, 2) is sequence|range(3) is sequence|map.items() is sequence|namespace() is sequence
map is mapping|numbers is mapping|none is mapping|undef is mapping|namespace(a=1) is mapping|text is mapping
text is string|none is string|seven is string|undef is string
seven is number|half is number|yes is number|text is number|none is number|big is number
yes is integer|seven is integer|half is integer|big is integer|yes is float|half is float|seven is float
yes is boolean|zero is boolean|none is boolean|yes is true|no is false|1 is true|0 is false|'true' is true
range is callable|text is callable|dict is callable|text.upper is callable|raise_exception is callable|namespace is callable|messages is callable
none is sameas none|none is sameas(none)|yes is sameas true|1 is sameas true|no is sameas(false)
1 is in [1, 2]|'a' is in 'abc'|'a' is in map|3 is in(numbers)
text is escaped|'tojson' is filter|'nope' is filter|'iterable' is test|'nope' is test
'abc' is lower|'ABC' is upper|'1' is lower|'' is upper|'aB' is lower|'ab1' is lower
7 is odd|7 is even|0 is even|minus is odd|9 is divisibleby 3|9 is divisibleby(2)|half is odd|2.0 is even
undef is defined|undef is undefined|none is defined|none is none|undef is none|map.zzz is defined|messages[9] is defined|map['a'] is defined
1 is eq 1|1 is equalto 1.0|1 is ne 2|1 is lt 2|2 is gt 1|1 is le 1|1 is ge 2|1 is lessthan 2|2 is greaterthan 1|1 is == 1
1 is not odd|text is not string|not text is string|messages[0].content is string and not none is iterable
undef.x is defined|none.x is defined|seven.x is defined
""".strip()

FILTERS = r"""
numbers | abs|minus | abs|text | attr('upper')|people[0] | attr('name')
numbers | batch(2) | list|range(5) | batch(2, 'x') | list|text | capitalize|'ÄB c' | capitalize|'ab' | center(7) ~ '|'|'abc' | center(6) ~ '|'
undef | default('d')|none | default('d')|none | default('d', true)|'' | default('d', boolean=true)|undef | d|zero | d('z', true)|undef.x | default('d')
map | dictsort|map | dictsort(true)|map | dictsort(by='value')|map | dictsort(false, 'value', true)|map | dictsort(case_sensitive=true)|map | dictsort(reverse=true)
'<a>&"\'' | escape|'<a>' | e|'<a>' | safe|'<a>' | forceescape|'<a>' | escape | escape|('<a>' | safe) ~ '<b>'
123456789 | filesizeformat|1000 | filesizeformat|1023 | filesizeformat(true)|0 | filesizeformat
numbers | first|'abc' | first|[] | first|numbers | last|'abc' | last|map | first|range(3) | last|map | last|[] | last
'3.7' | float|'x' | float|'x' | float(1.5)|none | float|seven | float|'1e3' | float|yes | float
'%s is %d' | format('a', 3)|'%(a)s-%(b)05.2f' | format(a=1, b=2.5)|'%5.1f|%-5s|%x' | format(2.25, 'ab', 255)|'%s %s' | format(none, true)|'%r' | format('it')|'%%' | format|'%s' | format(numbers)|'%s' | format(map)|'%c%o%e' | format('a', 8, 12345.678)|'%+d % d' | format(5, 5)|'%i' | format(2.9)|'%s' | format|'%d' | format('x')|'%.3s|' | format('abcdef')|'%g %G' | format(0.00001, 1e20)|'%#x' | format(255)
people | groupby('age')|people | groupby('town.name')|people | groupby('town.name', case_sensitive=true)|people | groupby('zip', default='?')|people | groupby('name') | map(attribute='grouper') | list|people | groupby('age') | map('first') | list
'a\nb\n\nc' | indent|'a\nb\n\nc' | indent(2, true)|'a\nb\n\nc' | indent(2, blank=true)|'a\nb' | indent('> ')|'a\nb' | indent(width=3, first=true)|'' | indent(2, true)|'a\n' | indent(2)|'a\r\nb' | indent(1)
'42' | int|'4.9' | int|'x' | int|'x' | int(5)|'0x1f' | int(0, 16)|'0x1f' | int(base=16)|4.9 | int|-4.9 | int|none | int|'12abc' | int|yes | int|' 7 ' | int|'1_000' | int|huge | int|'101' | int(0, 2)
map | items | list|undef | items | list|map | items|schema.properties | items | list|none | items | list|numbers | items | list
numbers | join|numbers | join(', ')|people | join(', ', attribute='name')|words | join('|')|mixed | join(',')|'abc' | join('-')|map | join(',')|[] | join(',')|undef | join(',')|people | join(', ', 'town.name')|[none, true, 1.0] | join(' ')
numbers | last|text | length|map | length|numbers | count|range(4) | length|undef | length|none | length|seven | length|'ä€😀' | length
'abc' | list|map | list|range(3) | list|(1, 2) | list|none | list|undef | list|map.items() | list|map.keys() | list
'ABC ÄÖ' | lower|'abc ß' | upper|none | lower|seven | upper|'İ' | lower|numbers | upper
people | map(attribute='name') | list|people | map(attribute='town.name') | join(',')|words | map('upper') | list|people | map(attribute='zip', default='-') | list|people | map(attribute='zip') | list|numbers | map('string') | list|words | map('replace', 'p', 'b') | list|people | map('attr', 'name') | list|people | map(attribute=1) | list|[[1, 2], [3, 4]] | map(attribute=1) | list|[[1, 2], [3, 4]] | map('last') | list|words | map('length') | sum|people | map('dictsort') | list|numbers | map|people | map(attribute='name')
numbers | max|numbers | min|words | max|words | min|words | min(case_sensitive=true)|people | max(attribute='age')|people | min(attribute='name')|[] | max|[1, 'a'] | max|mixed | max
numbers | pprint|map | pprint|'it' | pprint|none | pprint|people | pprint
numbers | random in numbers
people | rejectattr('age', 'eq', 30) | list|people | rejectattr('age') | list|people | selectattr('age', 'gt', 25) | map(attribute='name') | list|people | selectattr('zip') | list|people | selectattr('zip', 'defined') | list|people | selectattr('town.name', 'equalto', 'Ulm') | map(attribute='name') | list|messages | selectattr('role', 'equalto', 'tool') | list | length|messages | selectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | list|messages | rejectattr('role', 'equalto', 'system') | map(attribute='role') | join(',')|messages | selectattr('tool_calls', 'defined') | list | length|messages | selectattr('content', 'none') | list | length|messages | selectattr('role', '==', 'user') | first|people | selectattr('age', 'nope') | list
no | select('odd') | list|none | map('upper') | list|zero | rejectattr('x') | list|yes | select | list|undef | selectattr('x') | list|numbers | select('odd') | list|numbers | reject('odd') | list|mixed | select | list|mixed | reject | list|numbers | select('gt', 1) | list|mixed | select('string') | list|numbers | select('divisibleby', 3) | list|numbers | select('odd')
'aXbXc' | replace('X', '-')|'aXbXc' | replace('X', '-', 1)|'abc' | replace('', '.')|seven | replace('7', '8')|'aaa' | replace('a', 'b', count=2)|none | replace('N', 'n')
numbers | reverse | list|'abc' | reverse|map | reverse | list|range(3) | reverse | list|numbers | reverse
42.55 | round|42.55 | round(1)|42.55 | round(1, 'floor')|42.55 | round(1, 'ceil')|2.5 | round|3.5 | round|-2.5 | round|42 | round|2.675 | round(2)|1234 | round(-2)|42.55 | round(method='ceil')|0.5 | round | int|5 | round(1, 'floor')|1.5 | round(1, 'up')
range(5) | slice(2) | list|range(5) | slice(3, 'x') | list|numbers | slice(2) | map('length') | list
words | sort|words | sort(case_sensitive=true)|numbers | sort(reverse=true)|people | sort(attribute='age') | map(attribute='name') | list|people | sort(attribute='age,name') | map(attribute='name') | list|people | sort(attribute='name', reverse=true) | map(attribute='name') | list|map | sort|[3, 'a'] | sort|[none, 1] | sort|'bca' | sort|[1, 1.0, true] | sort|people | sort | list
seven | string|none | string|1.0 | string|yes | string|numbers | string|map | string|undef | string
'<p>Hi <b>there</b></p>\n x' | striptags|'a<!-- x -->b' | striptags|'&lt;a&gt;' | striptags
numbers | sum|people | sum(attribute='age')|numbers | sum(start=10)|[] | sum|[0.1, 0.2] | sum|people | sum('age', 1)|[[1], [2]] | sum(start=[])
'hello wORLD foo-bar it\'s (x)' | title|german | title|'a1b' | title
map | tojson|mixed | tojson|'<&>\'"/' | tojson|german | tojson|german | tojson(ensure_ascii=true)|map | tojson(indent=2)|map | tojson(sort_keys=true)|map | tojson(separators=(',', ':'))|nested | tojson(indent=1, separators=(';', '='))|undef | tojson|(1, 2) | tojson|range(2) | tojson|1e16 | tojson|1.0 | tojson|big | tojson|{1: 2, none: 3, true: 4, 1.5: 5} | tojson|{} | tojson(indent=2)|[] | tojson(indent=2)|[[], {}] | tojson(indent=4)|map | tojson(indent='\t')|map | tojson(true, 1)|map.keys() | tojson|map | items | tojson|namespace(a=1) | tojson|messages | tojson|'\u2028\x7f\x00😀' | tojson|'😀' | tojson(ensure_ascii=true)|map | tojson(indent=0)|(map | tojson) ~ '<'|huge | tojson|tiny | tojson|(1, 2) | tojson(indent=2)|map | tojson(indent=none)|map | tojson(indent=true)|numbers | select('odd') | tojson|numbers | reverse | tojson|{'a': undef} | tojson|map.items() | list | tojson|third | tojson|half | tojson(2)
spaces | trim ~ '|'|'xxaxx' | trim('x')|'xyaxy' | trim('yx')|seven | trim|none | trim|'--a--' | trim(chars='-')|'\x1f a \x85' | trim ~ '|'
text | truncate(12)|text | truncate(12, true)|text | truncate(12, false, '…')|text | truncate(44)|text | truncate(40, leeway=0)|text | truncate(41, false, '..', 0)|'abc' | truncate(2)|'abcdefghi' | truncate(3, true, '', 0)
words | unique | list|words | unique(true) | list|people | unique(attribute='age') | map(attribute='name') | list|[1, 1.0, true, 2] | unique | list|words | unique
'a b/c?d=é&f' | urlencode|map | urlencode|[('a', 1), ('b', 'x y')] | urlencode|seven | urlencode|'~-_.!' | urlencode
'see http://a.b/c now' | urlize
text | wordcount|'a, b-c  d' | wordcount|text | wordwrap(10)|text | wordwrap(10, false)|'abcdefghijkl' | wordwrap(5)|'abcdefghijkl' | wordwrap(5, false)|'a\nb c' | wordwrap(3)|text | wordwrap(15, wrapstring=' / ')
{'a': 1, 'b': none, 'c': '<x>'} | xmlattr|{'a': undef} | xmlattr|{} | xmlattr|{'id': 5} | xmlattr(false)
numbers | nope|'a,b' | split(',')|numbers | zip(words)|'a\nb' | lines|yes | bool|numbers | chain(words) | list
words | sort | join(',') | upper|map.values() | sum|map.values() | list | max|map.items() | map('first') | list|map.items() | selectattr(1, 'gt', 1) | list
text | upper | lower | title | replace('T', 't') | length + 1|-3 | abs|(-3) | abs|2 | float + 1
""".strip()

METHODS = r"""
'a b  c'.split()|'a,b,c'.split(',')|'a,b,c'.split(',', 1)|'a,b,c'.split(',', maxsplit=1)|'a,b,c'.split(sep=',')|' a b '.split(None, 1)|''.split()|''.split(',')|'a b c'.split(' ', -1)|'a'.split('')|' a  b c '.split(maxsplit=1)
'a,b,c'.rsplit(',', 1)|'a b c'.rsplit()|'a b  c '.rsplit(None, 1)|'a,b,c'.rsplit(',')|'a b c'.rsplit(maxsplit=1)
'  x '.strip() ~ '|'|'xxaxx'.strip('x')|'xyaxy'.strip('yx')|'\n\na\n'.strip('\n') ~ '|'|'  x '.lstrip() ~ '|'|'  x '.rstrip() ~ '|'|'\n x'.lstrip('\n')|'x...'.rstrip('.')|'x'.strip(none)
'abc'.startswith('a')|'abc'.startswith(('x', 'a'))|'abc'.startswith('b', 1)|'abc'.startswith('c', 1, 2)|'abc'.endswith('c')|'abc'.endswith(('x', 'c'))|'abc'.endswith('b', 0, 2)|'abc'.startswith('')|'abc'.startswith(['a'])
'prefix-x'.removeprefix('prefix-')|'x.txt'.removesuffix('.txt')|'x'.removesuffix('')
'hello world'.title()|'hELLO wORLD'.capitalize()|'Ab'.swapcase()|'ẞß'.casefold()|'ab'.upper()|'AB'.lower()|'ŉ'.upper()|'ǆ'.title()|'Σίσυφος ΣΑΣ'.lower()
'banana'.count('a')|'banana'.count('an', 2)|'banana'.count('')|'banana'.count('ana')|'banana'.find('n')|'banana'.find('z')|'banana'.find('n', 3)|'banana'.rfind('n')|'banana'.rfind('n', 0, 4)|'banana'.index('n')|'banana'.index('z')|'banana'.rindex('a')|'äbä'.find('b')|'banana'.find('a', -1)|'banana'.find('')
'{} {}'.format(1, 'a')|'{0}{1}{0}'.format('a', 'b')|'{a}'.format(a=1)|'{:>5}|{:<5}|{:^5}'.format('a', 'b', 'c')|'{:05d} {:.2f} {:x}'.format(7, 3.14159, 255)|'{!r}'.format('a')|'{{}}'.format()|'{[0]}'.format(numbers)|'{a[name]}'.format(a=people[0])|'{:,}'.format(1234567)|'{:%}'.format(0.5)|'{}'.format(none)|'{}'.format(numbers)|'{:*^9}'.format('x')|'{:+d}'.format(3)|'{:e}'.format(12345.678)|'{:b}'.format(5)|'{}'.format()|'{:10}'.format(3) ~ '|'|'{:10}'.format('a') ~ '|'|'{:d}'.format('a')|'{a.b}'.format(a={'b': 1})|'{:.1}'.format('abc')|'{:g}'.format(1e20)|'{:{}}'.format('a', 4) ~ '|'|'{}'.format(true)|'{}'.format(1.0)|'{:_}'.format(1234567)|'{0.__class__}'.format(1)
','.join(['a', 'b'])|','.join('abc')|','.join(map)|','.join([1])|', '.join(words | map('upper'))|''.join([])|','.join(map.keys())
'a\nb\r\nc\rd\x0be\x85f\u2028g'.splitlines()|'a\n'.splitlines()|'a\n\nb'.splitlines(true)|''.splitlines()|'a\nb'.splitlines(keepends=true)
'7'.zfill(3)|'-7'.zfill(4)|'+x'.zfill(5)|'abc'.zfill(2)|'a'.ljust(3) ~ '|'|'a'.rjust(3, '*')|'a'.center(4, '-')|'ab'.center(5, '-')|'abc'.center(2)
'12'.isdigit()|'²'.isdigit()|'½'.isnumeric()|'12'.isdecimal()|'²'.isdecimal()|''.isdigit()|'ab'.isalpha()|'a1'.isalnum()|'ab '.isalpha()|' '.isspace()|''.isspace()|'aB'.islower()|'ab1'.islower()|'AB'.isupper()|'Ab Cd'.istitle()|'a_1'.isidentifier()|'1a'.isidentifier()|'a\n'.isprintable()|'é'.isascii()|''.isascii()|'١'.isdigit()
'a-b-c'.partition('-')|'abc'.partition('-')|'a-b-c'.rpartition('-')|'a\tb'.expandtabs(4)|'a\tb'.expandtabs()|'aXbX'.replace('X', '-')|'aXbX'.replace('X', '-', 1)|'abc'.replace('', '-')|'aXbX'.replace('X', '', -1)
'abc'.translate({97: 'x'})|'ab'.encode()|'ab'.encode('utf-8')|'é'.encode().decode()
numbers.index(1)|numbers.index(9)|numbers.count(1)|numbers.append(4)|numbers.pop()|numbers.sort()|numbers.reverse()|numbers.insert(0, 1)|numbers.extend([1])|numbers.remove(1)|numbers.clear()|numbers.copy()|(1, 2).index(2)|(1, 2, 1).count(1)
map.items() | list|map.items()|map.keys() | list|map.keys()|map.values() | list|map.values()|map.get('a')|map.get('z')|map.get('z', 5)|map.get('z') is none|map.get('z', default=5)|map.pop('a')|map.update({'z': 1})|map.setdefault('z', 1)|map.clear()|map.popitem()|map.copy()|map.fromkeys(['a'])|dict.fromkeys(['a', 'b'], 1)|map.items() | length|map.keys() | first|map.items()[0]|('a' in map.keys())|(('a', 2) in map.items())|map.values() | map('string') | join(',')
nested.items|nested['items']|nested.keys|nested.get|nested.items()|nested.items is defined|schema.properties.p['items']|schema.properties.p.items is mapping|nested['keys']|nested.list|map.items is callable|nested.values is defined|nested.update is defined|map.nope is defined|text.upper is defined|numbers.append is defined|text.nope is defined|map.items.x is defined
text.upper()|text.nope()|none.upper()|undef.upper()|seven.bit_length()|half.is_integer()|seven.real|half.real|(2.0).is_integer()|seven.numerator|big.bit_length()
text.__class__|text['upper']|map.__class__|map['__class__']|numbers.__len__()|text._private|map | attr('__class__')|''.__class__.__mro__
map.nope()|map.a()|numbers.nope()
""".strip()

EXPRESSIONS = r"""
1 + 2 * 3|7 / 2|6 / 2|7 // 2|-7 // 2|7 // -2|7.5 // 2|-7.5 // 2|7 % 3|-7 % 3|7 % -3|-7.5 % 2|2 ** 10|2 ** -1|-2 ** 2|2 ** 3 ** 2|2 ** 0.5|2 ** 200|big * big|1 / 0|1 // 0|1 % 0|10 ** 20 + 1
'a' + 'b'|'a' ~ 1 ~ none ~ true ~ 1.0|'a' + 1|1 + 'a'|'ab' * 3|3 * 'ab'|[1] * 2|[1] + [2]|(1,) + (2,)|[1] + (2,)|none + 1|true + 1|'a' - 'b'|map + map|'a' * -1|undef + 'a'|'a' + undef|'a' ~ undef|undef ~ undef|none ~ ''|numbers ~ ''|'a' * 1.5
'%s' % 'a'|'%d items' % 3|'%s and %s' % ('a', 1)|'%(x)s' % {'x': 1}|'%05.1f' % 2.25|'%s' % numbers|'%s' % none|'%s' % undef|'%d%%' % 50|'%s' % ('a', 'b')|'a' % 'b'|text % ()
1 == 1.0|1 == true|'1' == 1|none == false|[1, 2] == [1, 2]|(1, 2) == [1, 2]|{'a': 1} == {'a': 1.0}|undef == none|undef == undef|'a' == 'a'|1 != 1|'' == none|undef == ''|map == map|0.1 + 0.2 == 0.3|[] == []|[] == ()|0 == false|range(2) == [0, 1]|map.keys() == ['b', 'a', 'C']
1 < 2 < 3|1 < 3 < 2|1 < 'a'|'a' < 'b'|'B' < 'a'|[1, 2] < [1, 3]|none < 1|1 == 1 == 1|3 > 2 > 1|1 < 2 == 2|true < 2|(1, 2) < (2,)|map < map|undef < 1|'a' < 'b' < 'c'|1 != 2 != 1
'a' in 'abc'|'z' not in 'abc'|1 in numbers|'a' in map|'a' in none|1 in 'a1'|'a' in undef|none in mixed|'1' in [1]|1.0 in [1]|true in [1]|'' in ''|'a' in 5|[1] in [[1]]|2 in range(3)|undef in [none]|none in map|[1] in map|'x' in 'a' ~ 'x'|undef in numbers
true and false|1 and 2|0 or 'x'|'' or none|not 0|not undef|undef or 'd'|none and 1|1 or 1/0|not none|'a' and ''|[] or {}|undef and 1
'a' if true else 'b'|'a' if false|('a' if false) ~ 'z'|('a' if false) is defined|1 if 0 else 2 if 0 else 3|'x' if undef else 'y'|'x' if [] else 'y'|'x' if {} else 'y'|'x' if 0.0 else 'y'|'x' if ' ' else 'y'|'x' if none else 'y'|'x' if map else 'y'|'x' if range(0) else 'y'|'x' if namespace() else 'y'
numbers[0]|numbers[-1]|numbers[9]|numbers[-9]|numbers[1:]|numbers[:-1]|numbers[::-1]|numbers[::2]|numbers[5:]|numbers[-2:]|numbers[1:1]|'hello'[1:3]|'hello'[::-1]|'hello'[-3:]|'hello'[0]|'hello'[9]|'héllo'[1]|text[4:9] ~ '|'|(1, 2, 3)[1:]|(1, 2, 3)[::-1]|range(10)[2:8:3] | list|range(10)[5]|range(10)[::-2] | list|numbers[::0]|numbers[none:2]|none[1:]|map[1:]|numbers['0']|numbers[1.0]|numbers[true]|'abc'[::2]|'abc'[5:1:-1]|'abcdef'[4:1:-1]|numbers[-100:100]|messages[1:][0].role|messages[-1].role|messages[:1] + messages[2:] | length|undef[0]|undef[1:]|seven[0]|'abc'['0']
map.a|map['a']|map.zzz|map['zzz']|map[none]|numbers.0|numbers.1|people.0.name|(1, 2).1|people[0]['town'].name|{'a': {'b': 1}}.a.b|{1: 'x'}[1]|{1: 'x'}[1.0]|{1: 'x'}['1']|{true: 'x'}[1]|{(1, 2): 'x'}[(1, 2)]|{'a b': 1}['a b']|map['a', 'b']|map.a.b.c|undef.a|undef.a.b|none.a|none.a.b|seven.a|text.a|text['a']
none|true|false|True|False|None|undef|1|1.0|1.5|-0.0|1e3|1E+3|1e16|1e-5|0.1|100000000000000000000.0|1_000|0x1f|0b11|0o17|.5 is defined|third|huge|tiny|million|exp|big|1.10|123456789.123456789|1e15|1e22|5e-324|9007199254740993|1e100|0.0001|0.00001
'a\nb'|'a\tb\\'|'\u00e9'|'\x41'|"it's"|'a\'b'|'a\qb'|'a' 'b'|'\N{BULLET}'|'\101'|'😀'|"\"q\""|'\r\n'|'\0'|'\a\b\f\v'|'\U0001F600'
numbers|mixed|map|(1, 2)|(1,)|()|[]|{}|[[]]|{'a': [1, (2, none)]}|['it\'s']|['"']|['"\'']|['a\nb\t\\']|['é€😀\u200b\x7f\u00ad']|[1.0, 1e16, 1e-7]|range(3)|range(1, 9, 2)|range(5, 0, -2) | list|range(0) | list|[undef]|[none, true]|{none: 1, true: 2, 1.5: 3}|{'a': 'b'}.items() | list|[range(2)]|messages[0]|people|[big]|namespace(a=1).a|[map.keys()]|[half, million]|{1: 'x', 'y': 2}|[('a', 1)]|['\x00\x1b']|nested|{'a': undef}|(undef,)|[1 if false]
range(3) | list|range(3, 0) | list|range(10, 0, -3) | list|range(2, 8, 2) | list|range(1, 2, 0)|range('a')|range(2.0)|range(-3) | list|range(100001) | length|range(3)[1]|range(3) | last|(range(3) | list) + [9]
dict(a=1)|dict(a=1, b='x')|dict([('a', 1)])|dict({'a': 1}, b=2)|dict()|dict(map, z=1) | tojson|dict(**map)|dict(map.items())|dict([['a', 1], ['b', 2]])
lipsum is defined|cycler is defined|joiner is defined|range is defined|dict is defined|namespace is defined|loop is defined|self is defined|caller is defined|strftime_now is defined|raise_exception is defined|debug is defined|lipsum() is string|varargs is defined
strftime_now('%Y-%m-%d')|strftime_now('%d %b %Y')|strftime_now('%B %-d, %Y')|strftime_now('%A %a %j %y %m %H:%M:%S %p %I')|strftime_now('%e|%k|%D|%F|%T|%%')|strftime_now('%U %W %w %u %V %G %h %C %s'[:23])|strftime_now('plain')
raise_exception('no')|raise_exception()|raise_exception(none)
1, 2|(1), 2|[1, 2,]|{'a': 1,}|(1, 2,)|[*numbers]|{**map}|[x for x in numbers]|numbers | map(lambda)
text.split(' ')[0] | upper|(text | upper)[0]|text | upper[0]|messages[1].content.strip() ~ '|'|messages[4]['content'].split('—')[-1].strip()|messages[2].tool_calls[0].function.arguments | tojson|messages[2].tool_calls[0].function.arguments.items() | list|messages | map(attribute='content') | list
not 1 == 2|not (1 == 2)|1 is not none|none is not none|1 + 1 is odd|-1 is odd|not undef is defined|2 * 3 | string|'a' ~ 'b' | upper|1 + 2 ~ 3|1 ~ 2 + 3|1 if 1 is odd else 2|- 1 | abs|+1|+'a'|-'a'|--1|not not 1|true == not false
1 <2>1|'a'in'ab'|1 if(1)else(2)|[1,2][0]|map [ 'a' ]|map . a|text | upper | trim()|text|upper|numbers|first
""".strip()


# Whole templates: statements, scopes and white space.
STATEMENTS = [
    # White space.
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "a\n  {%- if true -%}\n  b\n  {%- endif -%}\nc",
    "a\n  {%+ if true %}\n  b\n  {%+ endif %}\nc",
    "{% if true +%}\nb{% endif +%}\nc",
    "{% if true %}\n\nb{% endif %}\n\nc\n\n",
    "a  {{- ' b ' -}}  c",
    "a\n  {{ 'b' }}\n  c\n",
    "a {#- c -#} b",
    "a\n  {# c #}\nb",
    "a\n  {#- c #}\nb",
    "a\n  {# c -#}\n\n b",
    "a\n  {#+ c #}\nb",
    "a {{+ 'b' }} c",
    "{{ 'a' -}}\n\n  b",
    "\n\n a\n",
    "a\n",
    "a\n\n",
    "",
    "\n",
    "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n",
    "a\rb\r{% if true %}\rc{% endif %}\r",
    "{{ 'a\r\nb' }}|{{ 'a\rb' | length }}",
    "a\u2028{% if true %}\u2028b{% endif %}\u0085c\n",
    "a\x0b{% if true %}\x0bb{% endif %}\x0c\nc",
    "\u00a0{%- if true %}x{% endif -%}\u00a0y",
    "\u00a0{% if true %}x{% endif %}",
    "a\t {% if true %}\n\tb{% endif %}",
    "a{% raw %}{{ x }}{% if %}\n{% endraw %}\nb",
    "a\n  {%- raw -%}\n {{ x }} \n{%- endraw -%}\n b",
    "{% raw %}\n{{ a }}\n{% endraw %}\n|",
    "  {% raw %} a {% endraw %}  ",
    "{# a {{ b }} {% if %} #}x",
    "{# a #} b #}",
    "{% set x = 1 %}\n{% set y = 2 %}\n{{ x }}{{ y }}\n",
    "{%set x=1%}{{x}}{%-set y=2-%}{{y}}",
    "{{'a'}}{{ \"b\" }}{{''}}",
    "{ { a } } {% if true %}{ {% endif %}}",
    "{{ '{{' }}{{ '%}' }}{{ '#}' }}",
    "a\n# b\n## c\n% d\n",
    "  {% if true %}a{% endif %}  \n  b",
    "x {% if true %}\n y {% endif %}\n z",
    "{% for i in range(2) %}\n  {{ i }}\n{% endfor %}\n",
    "{% for i in range(2) -%}\n  {{ i }}\n{%- endfor %}\n",
    "    {%- for i in range(2) %}\n    {{- i }}\n    {%- endfor %}\n    end",
    # Conditions.
    "{% if false %}a{% elif none %}b{% elif 1 %}c{% else %}d{% endif %}",
    "{% if undef %}a{% else %}b{% endif %}",
    "{% if messages[0].role == 'system' and messages[0]['content'] %}{{ messages[0].content }}{% endif %}",
    "{% if not tools %}a{% endif %}{% if tools is not none %}b{% endif %}",
    "{% if tools is iterable and tools | length > 0 %}a{% else %}b{% endif %}",
    "{% if undef.x %}a{% endif %}",
    "{% if messages[0].nope.deeper is defined %}a{% else %}b{% endif %}",
    "{% if (1, 2) %}a{% endif %}{% if () %}b{% endif %}",
    # Loops.
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.index0 }} {% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role }}<{{ m.role }}>{{ loop.nextitem.role }};{% endfor %}",
    "{% for m in messages %}{{ (loop.previtem | default({'role': 'x'})).role }},{% endfor %}",
    "{% for m in messages %}{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}{{ m.role }}{% endif %}{% endfor %}",
    "{% for i in range(4) %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for i in [1, 1, 2, 2, 1] %}{{ 'c' if loop.changed(i) }}{{ i }}{% endfor %}",
    "{% for i in [] %}x{% else %}empty{% endfor %}",
    "{% for i in [1] %}x{% else %}empty{% endfor %}",
    "{% for i in numbers if i > 1 %}{{ loop.index }}:{{ i }}/{{ loop.length }} {% endfor %}",
    "{% for i in numbers if i > 5 %}x{% else %}none{% endfor %}",
    "{% for k, v in map.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in map | items %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in map | dictsort %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in map %}{{ k }}{% endfor %}",
    "{% for k, v in map %}{{ k }}{% endfor %}",
    "{% for c in 'héy' %}[{{ c }}]{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for x in none %}{% endfor %}",
    "{% for x in undef %}x{% else %}e{% endfor %}",
    "{% for x in seven %}{% endfor %}",
    "{% for x in tools or [] %}x{% endfor %}ok",
    "{% for i in range(3) %}{% for j in range(2) %}{{ loop.index }}{{ i }}{{ j }} {% endfor %}{{ loop.index }}{% endfor %}",
    "{% for i in range(2) %}{% set outer = loop %}{% for j in range(2) %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in range(5) if i is odd %}{{ i }}{{ loop.last }}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% endfor %}",
    "{% for item in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}<{{ item.n }}{% if item.c %}{{ loop(item.c) }}{% endif %}{{ loop.depth0 }}>{% endfor %}",
    "{% for i in range(3) %}{% set x = i %}{% endfor %}{{ x }}",
    "{% set x = 9 %}{% for i in range(3) %}{{ x }}{% set x = i %}{{ x }}{% endfor %}{{ x }}",
    "{% for i in range(2) %}{{ i }}{% endfor %}{{ i }}",
    "{% for loop in [1] %}{{ loop }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.role[0] }}{{ loop.index }}{% endfor %}",
    "{% for m in messages | selectattr('role', 'eq', 'assistant') %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for i in range(3) %}{{ loop }}{% endfor %}",
    "{% for i in range(3) %}{{ loop.nope }}x{% endfor %}",
    "{% for a in numbers %}{{ loop.index is divisibleby 2 }}{% endfor %}",
    "{% for x in numbers | batch(2) %}{{ x }}{% endfor %}",
    "{% for g in people | groupby('age') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}",
    "{% for age, list in people | groupby('age') %}{{ age }}{{ list | map(attribute='name') | join }}{% endfor %}",
    # Assignments and scopes.
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set (a, b) = (1, 2) %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}",
    "{% set x %}a {{ 1 }} b{% endset %}{{ x }}|{{ x | length }}",
    "{% set x | upper %}a{% endset %}{{ x }}",
    "{% set x | replace('a', 'b') | upper %}aa{% endset %}{{ x }}",
    "{% set ns = namespace(n=0, l=[]) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.n }}{{ ns.l }}",
    "{% set ns = namespace() %}{% set ns.x = 1 %}{{ ns.x }}{{ ns.y }}{{ ns.y is defined }}",
    "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}{{ ns['a'] }}",
    "{% set ns = namespace(_a=1) %}{{ ns._a }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{% set ns = namespace(a=1) %}{{ ns }}",
    "{% set ns.x = 1 %}",
    "{% set x = {} %}{% set x.a = 1 %}{{ x }}",
    "{% if true %}{% set x = 1 %}{% endif %}{{ x }}",
    "{% set x = 1 %}{% with %}{% set x = 2 %}{{ x }}{% endwith %}{{ x }}",
    "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% set a = 5 %}{% with a = 1, b = a %}{{ b }}{% endwith %}",
    "{% set messages = messages[1:] %}{{ messages | length }}",
    "{% set x = x | default(3) %}{{ x }}",
    "{% set none = 5 %}{{ none }}",
    "{% set true = 5 %}",
    "{% set loop_messages = messages %}{% for m in loop_messages %}{{ m.role[:1] }}{% endfor %}",
    "{% set x = [] %}{% set _ = x.append(1) %}{{ x }}",
    "{% do numbers.append(1) %}",
    "{% do 1 %}",
    "{% print 1 %}",
    "{%- set x = 'a' if yes else 'b' -%}{{ x }}{%- set y = numbers, text -%}{{ y | length }}",
    "{% if 1, 2 %}a{% endif %}",
    "{% for i in 1, 2 %}{{ i }}{% endfor %}",
    "{% for a, b in map.items() if b > 1 %}{{ a }}{% else %}none{% endfor %}",
    "{% for x in numbers if x % 2 == 1 %}{{ x }}{{ loop.length }}{% endfor %}",
    "{% for x in (numbers if yes else []) %}{{ x }}{% endfor %}",
    "{% call(x) messages[0].nope() %}{% endcall %}",
    "{% set x = {'a': 1, 'b': [1, 2]} %}{% set y = x.b[0] ~ x['a'] %}{{ y }}",
    "{{ 'a'\n  ~ 'b'\n  % () }}",
    "{{ {'a': {'b': 7}}.a.b % 4 }}{{ {'a': {}}|length }}",
    "{{ [{'a': {'b': '%s'}}][0].a.b % 'x' }}{% if {'a': {'b': 1}}.a.b < 2 %}y{% endif %}",
    "{{ {'a': {'b': 1}} }}}}{{ '}}' }}",
    "{{ {'a': 1}['a'] % 2 }}{{ {}|length }}{{ {'x': {'y': {}}} }}",
    "{%- macro m(a, b=a ~ 'x', c=none) %}\n  {{ a }}{{ b }}{{ c }}\n{% endmacro -%}[{{ m(1) }}{{ m(1, 2) }}{{ m(a=3, c=4) }}]",
    "{% set f = map.get %}{{ f('a') }}{{ f('z', 9) }}",
    "{% set items = schema.items %}{% for k, v in items() %}{{ k }}{% endfor %}",
    "{{ message.items if message is defined else 'none' }}",
    "{{ messages | map(attribute='content') | select('string') | map('length') | list }}",
    "{{ numbers.index(1) ~ loop }}",
    "{% set x = dict(a=1) %}{% set _ = x.update({'b': 2}) %}{{ x }}",
    # Macros.
    "{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=4, a=5) }}{{ m() }}",
    "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}",
    "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }}",
    "{% macro m(a) %}{{ a }}{{ varargs | join(',') }}{% endmacro %}{{ m(1, 2, 3) }}",
    "{% macro m(a) %}{{ kwargs.x }}{{ kwargs | length }}{% endmacro %}{{ m(1, x=2) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(x=2) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, a=2) }}",
    "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}x{% endcall %}",
    "{% macro m() %}<{{ caller(1, 2) }}>{% endmacro %}{% call(a, b) m() %}{{ a }}{{ b }}{% endcall %}",
    "{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{{ n }}{% if n > 0 %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}",
    "{% macro m() %}\n  a\n{% endmacro %}[{{ m() }}]",
    "{%- macro m(x) -%}\n  {{ x }}\n{%- endmacro -%}[{{ m(1) | trim }}]",
    "{% set y = 1 %}{% macro m() %}{{ y }}{% endmacro %}{% set y = 2 %}{{ m() }}",
    "{% macro m() %}{% set z = 3 %}{{ z }}{% endmacro %}{{ m() }}{{ z }}",
    "{% for i in range(2) %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}",
    "{{ m() }}{% macro m() %}late{% endmacro %}",
    "{% macro m(a, b='x') %}{% endmacro %}{{ m.name }}{{ m.arguments }}{{ m.caller }}{{ m.catch_varargs }}{{ m.catch_kwargs }}",
    "{% macro m() %}{{ loop is defined }}{% endmacro %}{% for i in [1] %}{{ m() }}{% endfor %}",
    "{% macro m(x) %}{{ x | upper }}{% endmacro %}{{ ['a', 'b'] | map('upper') | join }}{{ m('q') ~ m('r') }}",
    "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(undef) }}|{{ m(none) }}|{{ m(x=numbers) }}",
    "{% macro m(x=none) %}{{ x is none }}{% endmacro %}{{ m() }}{{ m(undef) }}",
    "{% macro m(*args) %}{% endmacro %}",
    "{% macro render(p) %}{% for k, v in p.items() %}{{ k }}:{% if v is mapping %}({{ render(v) }}){% else %}{{ v }}{% endif %};{% endfor %}{% endmacro %}{{ render(schema) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(*[1]) }}{{ m(**{'a': 2}) }}",
    # Filters and blocks.
    "{% filter upper %}a {{ 'b' }}{% endfilter %}",
    "{% filter replace('a', 'b') | upper %}a{% endfilter %}",
    "{% filter indent(2) %}a\nb{% endfilter %}",
    "{% block x %}a{% endblock %}|{{ self.x() }}",
    "{% block x %}a{% endblock x %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% include 'x' %}",
    "{% include 'x' ignore missing %}",
    "{% import 'x' as y %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% generation %}a{{ 1 }}{% endgeneration %}",
    "{%- generation -%} a {%- endgeneration -%} b",
    "  {% generation %}\n  a\n  {% endgeneration %}\nb",
    "{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% generation %}{% if loop.index == 2 %}{% break %}{% endif %}{% endgeneration %}{% endfor %}",
    "{% trans %}a{% endtrans %}",
    "{% debug %}",
    "{% nope %}",
    "{% if true %}a",
    "{{ a",
    "{% endif %}",
    "{{ }}",
    "{{ 1 2 }}",
    "{% set %}",
    "{% for %}",
    "{{ a b }}",
    "{{ 'a }}",
    "{% if true %}a{% endfor %}",
    "{% break %}",
    "{% else %}",
    "{% call undef() %}x{% endcall %}",
    "{{ undef() }}",
    "{{ seven() }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.reset() }}{{ c.current }}",
    "{% set j = joiner('|') %}{% for i in range(3) %}{{ j() }}{{ i }}{% endfor %}",
    "{% set j = joiner() %}{{ j() }}a{{ j() }}b",
    # As real templates do it.
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}{{ system }}{{ rest | length }}",
    "{%- for key in schema.keys() | reject('in', ['type', 'required']) %}{{ key }}{%- endfor %}",
    "{%- for json_key in map if json_key not in ['a'] %}{{ json_key }}={{ map[json_key] | string }}{%- endfor %}",
    "{%- set args_value = numbers | tojson | safe if numbers is mapping or (numbers is sequence and numbers is not string) else numbers | string %}{{ args_value }}",
    "{%- for name, value in messages[2].tool_calls[0].function.arguments | items %}<{{ name }}>{{ value if value is string else value | tojson }}</{{ name }}>{%- endfor %}",
    "{%- for name, value in messages[2].tool_calls[0].function.arguments.items() %}<{{ name }}>{{ value }}</{{ name }}>{%- endfor %}",
    "{{ messages[2].tool_calls[0].function.arguments }}",
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == 'user' %}{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{{ ns.last_query_index }}",
    "{%- set content = '<think>a</think>\\n\\nb' %}{{ content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}|{{ content.split('</think>')[-1].lstrip('\\n') }}",
    "{%- if (messages | selectattr('role', 'equalto', 'system') | list | length) > 0 %}s{%- endif %}{{ messages | map(attribute='role') | unique | list }}",
    "{{- '<|im_start|>' + messages[0].role + '\\n' + messages[0].content + '<|im_end|>' + '\\n' }}",
    "{{ bos_token + eos_token + (pad_token or '') }}",
    "{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{{ date }}",
    "{%- if 'tool_calls' in messages[2] and messages[2]['tool_calls'] %}{{ messages[2]['tool_calls'] | length }}{%- endif %}{{ 'name' in messages[0] }}",
    "{{ messages[1].content[:4] ~ '…' if messages[1].content | length > 4 }}",
    "{%- set types = ['string', 'null'] %}{{ types | join(' | ') }}{{ types[0] if types is sequence and types is not string else types }}",
    "{{ (schema.properties.p.enum | tojson) if schema.properties.p.enum is defined }}{{ schema.properties.p.description is defined and schema.properties.p.description != '' }}",
    "{%- for param, fields in schema.properties | dictsort %}{{ param }}{{ fields.type }}{{ fields['items'] | tojson if fields['items'] is defined }}{%- endfor %}",
    "{% set n = [] %}{% for m in messages %}{% set n = n + [m.role] %}{% endfor %}{{ n }}",
    "{{ '%s' | format(messages[0].role) }}{{ 'a'.join(['x', 'y']) }}{{ ['x'] + ['y'] }}",
    "{{ messages[2].content ~ '' }}|{{ messages[2].content or '' }}|{{ messages[2]['content'] if messages[2].content is not none }}",
    "{{ messages[2].get('content') }}{{ messages[2].get('nope', '') }}{{ messages[0].get('content', 'x').strip() }}",
]


def constructs() -> list[str]:
    """All sources, each once. In the lists above a bar without spaces separates two expressions."""
    sources = []
    for block in (TESTS, FILTERS, METHODS, EXPRESSIONS):
        for line in block.split("\n"):
            sources += ["{{ " + part + " }}" for part in split(line)]
    return list(dict.fromkeys(sources + STATEMENTS))


def split(line: str) -> list[str]:
    """The expressions of a line: a bar inside quotes or beside a space is part of one."""
    parts, quote, start, at = [], None, 0, 0
    while at < len(line):
        char = line[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = None
        elif char in "'\"":
            quote = char
        elif char == "|" and line[at - 1] != " " and line[at + 1 : at + 2] != " ":
            parts.append(line[start:at])
            start = at + 1
        at += 1
    return [part for part in parts + [line[start:]] if part.strip()]
