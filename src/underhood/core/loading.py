"""From a name, a folder or a module to a `Model`.

Weights are read from safetensors; a pickle only the way transformers reads it, restricted to
tensors. Every failure says what is there and what to do: no network, a Git-LFS pointer instead of
weights, code of the model's own that nobody allowed.
"""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from underhood.core.errors import FileProblem, ModelNotFound, UntrustedCode, UsageError
from underhood.core.model import Model

__all__ = ["as_device", "as_dtype", "from_module", "from_pretrained", "no_bars"]

REACH = 5.0  # seconds to wait for the hub
LFS_MARK = b"version https://git-lfs"


def from_module(
    module: nn.Module, tokenizer: Any = None, *, name: str = "", pad_token: str | None = None
) -> Model:
    """Wrap a module that is in memory already; it stays as it is."""
    return Model(module, tokenizer, name=name, pad_id=_pad_id(tokenizer, pad_token))


def from_pretrained(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
    label: str | None = None,
    **options: Any,
) -> Model:
    """Load a Hugging Face folder or hub id.

    Args:
        name: A folder, or an id such as "gpt2".
        device: Where to put it; default where transformers does.
        dtype: Precision; default the checkpoint's own.
        revision: Branch, tag or commit on the hub.
        pad_token: A token to pad with, for tokenizers without one (padding is always masked).
        trust_remote_code: Let code that comes with the model run.
        label: Name in reports; default `name`.
        options: Passed to transformers' `from_pretrained` (`attn_implementation`, `device_map`...).

    Raises:
        ModelNotFound: No such folder; or not in the cache and no network.
        FileProblem: A folder without weights, or with pointers instead of them.
        UntrustedCode: The model brings its own Python code.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
        _check_folder(folder, trusted=trust_remote_code)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(
            f"there is no folder {name}",
            given=name,
            why=f"{folder.absolute()} does not exist",
            do="check the path, or give a hub id such as gpt2",
        )
    else:
        _check_reachable(name, revision)
    device, dtype = as_device(device), as_dtype(dtype)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    module = _load_module(name, common | {"dtype": dtype or "auto"} | options)
    tokenizer = _load_tokenizer(name, common)
    if device is not None:
        module = module.to(device)
    module.eval()
    return Model(module, tokenizer, name=label or name, pad_id=_pad_id(tokenizer, pad_token))


def as_device(device: str | torch.device | None) -> torch.device | None:
    """A device that exists here.

    Raises:
        UsageError: Unknown, or not on this machine.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"there is no device {str(device)!r} here",
            given=str(device),
            why=str(error).splitlines()[0],
            do="use cpu, or a device that `underhood doctor` lists",
        ) from error
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating precision by name.

    Raises:
        UsageError: No such precision.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(
            f"there is no precision {str(dtype)!r}",
            given=str(dtype),
            do="use float32, bfloat16, float16 or float64",
        )
    return found


def _check_reachable(name: str, revision: str | None) -> None:
    """Whether a hub id is in the cache or can be asked for, without minutes of retries."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if try_to_load_from_cache(name, "config.json", revision=revision):
            return
        HfApi().model_info(name, revision=revision, timeout=REACH)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 0) in (401, 403):
            return  # private or gated: transformers says so better
        raise _not_found(name, f"the hub has no such model ({error})") from error
    except (HFValidationError, ValueError) as error:
        raise _not_found(name, f"this is not a hub id ({error})") from error
    except Exception as error:  # no network: every HTTP library has its own word for it
        place = constants.HF_HUB_CACHE
        raise _not_found(name, f"offline, and it is not in the cache {place}") from error


def _not_found(name: str, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"there is no model {name!r}",
        given=name,
        why=why.splitlines()[0][:300],
        do="check the name; go online once; give a local folder; or use the built-in model:"
        " leave the name out",
    )


def _check_folder(folder: Path, *, trusted: bool) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise FileProblem(
            "the folder holds no model",
            given=str(folder),
            why="there is no config.json in it",
            do="give a folder written by save_pretrained",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileProblem(
            "config.json cannot be read", given=str(path), why=str(error), do="copy the file again"
        ) from error
    if not isinstance(config, dict):
        raise FileProblem(
            "config.json describes no model",
            given=str(path),
            why=f"it holds a {type(config).__name__}, not settings by name",
            do="copy the file again",
        )
    if config.get("auto_map") and not trusted:
        raise UntrustedCode(
            "the model brings its own Python code, which would run on your machine",
            given=f"{folder}: {config['auto_map']}",
            why="its config.json has an auto_map, and nobody said that its code may run",
            do="read that code; then pass trust_remote_code=True",
        )
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise FileProblem(
            "the folder holds no weights",
            given=str(folder),
            why="there is no .safetensors file in it, and no pytorch_model.bin",
            do="download the weights, or copy them there",
        )
    for file in weights:
        with file.open("rb") as stream:
            if stream.read(len(LFS_MARK)) == LFS_MARK:
                raise FileProblem(
                    "a weight file is a Git-LFS pointer, not weights",
                    given=f"{file} ({file.stat().st_size} bytes)",
                    why="the repository was cloned without its large files",
                    do="run `git lfs pull` in that folder",
                )


def _load_module(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
        )
        cls = _class_for(config, transformers)
        with no_bars():
            module, report = cls.from_pretrained(name, output_loading_info=True, **options)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        raise FileProblem(
            "the weight file holds more than tensors, and was not read",
            given=name,
            why="a pickle can run any code, so only tensors are taken from one",
            do="get the weights as .safetensors, or convert them where you trust them",
        ) from error
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise _explained(name, error) from error
    if missing := sorted(report["missing_keys"]):
        raise FileProblem(
            "the weights are not complete",
            given=f"{name}: {len(missing)} tensors are missing, {', '.join(missing[:3])}, ...",
            why="transformers would fill them with random numbers",
            do="get all weight files; or name the class that they were saved from in config.json",
        )
    return module


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars from transformers inside the block; the user's setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _class_for(config: Any, transformers: Any) -> Any:
    """The architecture that the checkpoint names, else a causal language model."""
    for architecture in getattr(config, "architectures", None) or ():
        if found := getattr(transformers, architecture, None):
            return found
    return transformers.AutoModelForCausalLM


def _explained(name: str, error: Exception) -> Exception:
    text = str(error)
    if "trust_remote_code" in text:
        return UntrustedCode(
            "the model brings its own Python code, which would run on your machine",
            given=name,
            why="transformers does not know its architecture; nobody said that its code may run",
            do="read that code on its page; then pass trust_remote_code=True",
        )
    if not Path(name).is_dir():
        return _not_found(name, text)
    return FileProblem(
        "the folder's model cannot be loaded",
        given=name,
        why=text.splitlines()[0][:300],
        do="check that config.json, the weights and this version of transformers fit together",
    )


def _load_tokenizer(name: str, common: dict[str, Any]) -> Any:
    import transformers

    folder = Path(name)
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / n).is_file() for n in known):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **common)
    except (OSError, ValueError, KeyError):
        return None  # a vision or audio model; text input is refused when it is tried


def _pad_id(tokenizer: Any, pad_token: str | None) -> int | None:
    if pad_token is None or tokenizer is None:
        return None
    found = tokenizer.convert_tokens_to_ids(pad_token)
    if found is None or found == getattr(tokenizer, "unk_token_id", None):
        raise UsageError(
            f"the tokenizer has no token {pad_token!r}",
            given=pad_token,
            do="choose one of its own, e.g. its end-of-text token",
        )
    return int(found)
