"""Figures, durations, sizes and long texts as people read them: the same in the terminal, on the card, in reports."""

from __future__ import annotations

import difflib
import io
import math
import os
import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class _Power(str):
    """A form of numbers that are written as powers of ten above a million.

    >>> _Power("{:,.3f}").format(7.389), _Power("{:,.3f}").format(3e12)
    ('7.389', '10^12.5')
    """

    def format(self, *values: Any, **named: Any) -> str:
        value = values[0]
        if not value > 1e6:  # not a number is none
            return super().format(*values, **named)
        return "above 10^304" if value > 1e304 else f"10^{math.log10(value):.1f}"


# figure of an evaluation -> how it is written, in the order of a table
FORMS: dict[str, str] = {
    "loss": "{:,.3f}",
    "perplexity": _Power("{:,.3f}"),
    "exact_match": "{:.1%}",
    "rougeL": "{:.3f}",
    "bleu": "{:.1f}",
    "answer_tokens": "{:.1f}",
    "stopped": "{:.1%}",
    "repeated": "{:.1%}",
}
_NAMES = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "answer_tokens": "tokens in an answer",
    "stopped": "stops by itself",
    "repeated": "repeated 4-grams",
    "token_f1": "token F1",
    "stops": "stops by itself",
    "valid_json": "valid JSON",
    "tool_names": "right tools called",
    "tool_calls": "right calls",
}
SHARES = ("exact_match", "stops", "valid_json", "tool_names", "tool_calls")  # of rows


def name_of(figure: str) -> str:
    """A figure's name for people.

    >>> name_of("exact_match"), name_of("rougeL")
    ('exact match', 'ROUGE-L')
    """
    return _NAMES.get(figure, figure.replace("_", " "))


def figure(name: str, value: float) -> str:
    """A figure of answers with its name.

    >>> figure("exact_match", 0.9107), figure("token_f1", 0.4), figure("score", 12.5)
    ('exact match 91.1%', 'token F1 0.400', 'score 12.500')
    """
    return f"{name_of(name)} {value:.1%}" if name in SHARES else f"{name_of(name)} {value:.3f}"


def spread(name: str, value: float, low: float, high: float) -> str:
    """A figure of answers with its interval.

    >>> spread("exact_match", 0.9107, 0.804, 0.97), spread("score", 12.5, 11.0, 14.0)
    ('91.1% (80.4% to 97.0%)', '12.500 (11.000 to 14.000)')
    """
    form = "{:.1%}" if name in SHARES else "{:.3f}"
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


def perplexity(loss: float) -> str:
    """The perplexity of a loss in nats; above a million as a power of ten.

    >>> perplexity(2.0), perplexity(2634433.0)
    ('7.39', '10^1144119.7')
    """
    return f"{math.exp(loss):.2f}" if loss <= math.log(1e6) else f"10^{loss / math.log(10):.1f}"


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line; its type where it says nothing.

    >>> first_line(ValueError("no such key\\n  at line 3")), first_line(KeyError())
    ('no such key', 'KeyError')
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def clock(seconds: float) -> str:
    """A duration.

    >>> clock(78.9), clock(4), clock(7400)
    ('1 min 19 s', '4 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def size(count: float) -> str:
    """Bytes in files, in the units by which disks are sold.

    >>> size(2_638_848), size(14_483_464_192), size(1_350)
    ('2.6 MB', '14.5 GB', '1.4 kB')
    """
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory_size(count: float) -> str:
    """Bytes in memory, in the units by which memory is sold.

    >>> memory_size(3 << 30), memory_size(200 << 20), memory_size(5000)
    ('3.0 GiB', '200 MiB', '5 KiB')
    """
    if count >= 1 << 30:
        return f"{count / (1 << 30):,.1f} GiB"
    return f"{count / (1 << 20):,.0f} MiB" if count >= 1 << 20 else f"{count / (1 << 10):,.0f} KiB"


def short(text: str, limit: int) -> str:
    """One line of at most `limit` characters.

    >>> short("one\\n  two three", 9)
    'one two …'
    """
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def typed(path: object) -> str:
    """A path as it is typed in a command, for POSIX shells and for Windows.

    >>> typed("runs/first"), typed("runs/my first"), typed("-x")
    ('runs/first', "'runs/my first'", './-x')
    """
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if os.name == "nt":
        return f'"{text}"' if " " in text else text
    return shlex.quote(text)


def closest(word: Any, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name that looks most like a word, if any does; case and hyphens do not count."""
    plain = {name.lower().replace("-", "_"): name for name in names}
    close = difflib.get_close_matches(str(word).lower().replace("-", "_"), plain, n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def nearest(word: Any, names: Iterable[str], *, cutoff: float = 0.6, prefix: str = "") -> str:
    """`; did you mean "dolly-15k"?`, or "" when nothing is near.

    >>> nearest("doly-15k", ["dolly-15k", "alpaca"])
    '; did you mean "dolly-15k"?'
    """
    name = closest(word, names, cutoff=cutoff)
    return f'; did you mean "{prefix}{name}"?' if name else ""


def yaml_text(values: dict[str, Any]) -> str:
    """Plain values as YAML that both a 1.2 and a 1.1 reader take for the same.

    >>> yaml_text({"run_name": "no", "learning_rate": 1e-05})
    "run_name: 'no'\\nlearning_rate: 1.0e-05\\n"
    """
    # key by key: a run writes its sections three times, into `recipe.yaml`, its page and its card
    return "".join(_written(key, value) for key, value in values.items()) or "{}\n"


def _written(key: str, value: Any) -> str:
    same = repr((key, value))
    if same not in _WRITTEN:
        while len(_WRITTEN) >= _KEPT:
            del _WRITTEN[next(iter(_WRITTEN))]
        _WRITTEN[same] = _dumped({key: value})
    return _WRITTEN[same]


_WRITTEN: dict[str, str] = {}  # YAML of a key and its value, by how Python writes them
_KEPT = 64


def _dumped(values: dict[str, Any]) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        def text(self, value: str) -> Any:
            quoted = _WORDS_IN_YAML_1_1.fullmatch(value) or re.match(r"[-+.\d]", value)
            return self.represent_scalar("tag:yaml.org,2002:str", value, style="'" if quoted else None)

        def number(self, value: float) -> Any:
            if not math.isfinite(value):
                return self.represent_float(value)
            text = repr(value)
            text = text if "." in text else text.replace("e", ".0e")  # 1.1 reads 1e-05 as a text
            return self.represent_scalar("tag:yaml.org,2002:float", text)

    Representer.add_representer(str, Representer.text)
    Representer.add_representer(float, Representer.number)
    writer: Any = YAML(typ="safe", pure=True)
    writer.Representer = Representer
    writer.default_flow_style, writer.width, writer.allow_unicode = False, 120, True
    writer.sort_base_mapping_type_on_output = False  # keep the order of the contract
    stream = io.StringIO()
    writer.dump(values, stream)
    return stream.getvalue()


_WORDS_IN_YAML_1_1 = re.compile(r"y|n|yes|no|on|off", re.IGNORECASE)  # true and false there


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Tokens that a share of the rows does not exceed, by the nearest rank.

    >>> quantiles(np.array([1, 2, 3, 4]))
    {'p50': 2, 'p90': 4, 'p99': 4, 'max': 4}
    """
    import numpy as np

    if len(lengths) == 0:
        return {"p50": 0, "p90": 0, "p99": 0, "max": 0}
    found = {f"p{q}": int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99)}
    return {**found, "max": int(lengths.max())}


def plain_table(*columns: str, left: int = 1) -> Any:
    """A table without lines; the first `left` columns hold text, the others figures."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table
