"""The chat template of a base as it was when a run began, and whether the Hub has another one by now.

A template on a branch of the Hub is mended now and then. A model that was tuned keeps the one that it was trained with;
who serves it by the base's, or tunes it further, should know that they differ.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from instructft.weights.base_record import is_hub_id

_FILES = ("chat_template.jinja", "tokenizer_config.json")  # the first one is what counts where there are both
_SECONDS = 2.0  # that a reply of the Hub may take
_BYTES = 8 << 20


def hash_of(template: str) -> str:
    """16 hexadecimal digits by which a template is known, as in the checkpoints of a run."""
    return sha256(template.encode()).hexdigest()[:16]


def own_template(read: Callable[[str], str | None]) -> str | None:
    """The template that a model's files hold, the one for chatting where they hold several; None: they hold none.

    Args:
        read: the text of a file by its name; None where there is none.

    >>> own_template({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}.get)
    '{{ messages }}'
    """
    if (text := read(_FILES[0])) is not None:
        return text
    try:
        held = json.loads(read(_FILES[1]) or "{}").get("chat_template")
    except (ValueError, AttributeError, RecursionError):
        return None
    if isinstance(held, list):
        held = {one.get("name"): one.get("template") for one in held if isinstance(one, dict)}
    if isinstance(held, dict):
        held = held.get("default")
    return held if isinstance(held, str) else None


def at_hand(name: str, revision: str | None, subfolder: str | None) -> str | None:
    """The hash of a base's own template as it lies in its folder, or in the Hub's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    def read(file: str) -> str | None:
        inside = f"{subfolder}/{file}" if subfolder else file
        path: Any = Path(name).expanduser() / inside
        if not path.is_file():
            path = try_to_load_from_cache(name, inside, revision=revision or "main") if is_hub_id(name) else None
        try:
            return Path(path).read_text(encoding="utf-8") if isinstance(path, str | Path) else None
        except (OSError, ValueError):
            return None

    text = own_template(read)
    return None if text is None else hash_of(text)


def on_the_hub(name: str, revision: str | None, subfolder: str | None) -> str | None:
    """The same as the Hub has it now, read past the cache, which stays as it is; None: no reply, or no template."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    def read(file: str) -> str | None:
        url = hf_hub_url(name, file, subfolder=subfolder or None, revision=revision or "main")
        answer = get_session().get(url, headers=build_hf_headers(), timeout=_SECONDS, follow_redirects=True)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return str(answer.text) if len(answer.content) <= _BYTES else None

    text = own_template(read)
    return None if text is None else hash_of(text)


class TemplateWatch:
    """Looks, beside what else is done, whether the template of a run's base is another one on the Hub now.

    Args:
        model: a run folder; of anything else nothing is known, and nobody is asked.

    >>> TemplateWatch("org/model").said()
    ''
    """

    def __init__(self, model: str | Path):
        self._now: str | None = None
        self._thread: threading.Thread | None = None
        self._base, self._then = _recorded(Path(model).expanduser())
        if self._then is None:
            return
        # a daemon: a Hub that does not answer keeps nobody from ending
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        from huggingface_hub import constants

        where = (self._base["name_or_path"], self._base.get("revision"), self._base.get("subfolder"))
        found = None
        if not constants.HF_HUB_OFFLINE:
            try:
                found = on_the_hub(*where)
            except Exception:  # whatever keeps the Hub from answering is no concern of who wants to chat
                found = None
        self._now = found or at_hand(*where)

    def said(self, patience: float = 0.0) -> str:
        """What to tell, once it is known; "" where they are the same, or nobody knows by now.

        Args:
            patience: seconds to wait for the Hub at most.
        """
        if self._thread is not None:
            self._thread.join(patience)
        if self._now is None or self._now == self._then:
            return ""
        return (
            f"the chat template of {self._base['name_or_path']} on the Hub has changed since this run began "
            f"(sha256 {self._then} then, {self._now} now); this model keeps the one it was trained with"
        )


def _recorded(folder: Path) -> tuple[Mapping[str, Any], str | None]:
    """The base of a run and the hash of its own template then; None where no branch of the Hub can have changed it."""
    for place in (folder, folder.parent):  # a checkpoint lies in its run
        try:
            facts = json.loads((place / "run.json").read_text(encoding="utf-8"))
            base, then = facts["base"] or {}, facts["template"]["of_base"]
            name, revision = str(base["name_or_path"]), str(base.get("revision") or "main")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        pinned = re.fullmatch(r"[0-9a-f]{40}", revision) is not None
        return base, then if is_hub_id(name) and not Path(name).exists() and not pinned else None
    return {}, None
