"""``serve-app convert``, to be registered by :mod:`serve_app.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from serve_app.errors import ConfigError, UserError

if TYPE_CHECKING:
    from serve_app.convert.draft import Draft


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write; else shown.")
def convert(file: Path, output: Path | None) -> None:
    """Write our config for FILE, one of LiteLLM, Ray Serve LLM or `vllm serve --config`.

    What has no counterpart is said, a line each, on standard error and in the config's comments.
    """
    if output is not None and output.exists():
        raise UserError(f"convert: {output} is there already; name another file, or remove it")
    draft = draft_of(file)
    text = draft.to_yaml(file)
    if output is None:
        click.echo(text, nl=False)
    else:
        try:
            output.write_text(text)
        except OSError as error:
            raise UserError(f"convert: {output} cannot be written ({error.strerror})") from None
    for remark in draft.all_remarks():
        click.echo(str(remark), err=True)
    if output is not None:
        count = len(draft.models)
        models = "1 model" if count == 1 else f"{count} models"
        click.echo(f"{output}: {models}; next: serve-app plan {output}", err=True)


def draft_of(file: Path) -> Draft:
    """What becomes of a config.

    Raises:
        ConfigError: it is none of the three, or has a mistake.
    """
    from serve_app.config import foreign
    from serve_app.convert import litellm, ray_serve_llm, source, vllm_serve

    formats = {
        foreign.LITELLM: litellm.convert,
        foreign.RAY_SERVE_LLM: ray_serve_llm.convert,
        foreign.VLLM_SERVE: vllm_serve.convert,
    }
    whole = source.read(file)
    program = foreign.recognize(whole.value)
    if program is None and foreign.resembles_vllm_serve(whole.value):
        program = foreign.VLLM_SERVE  # its mistakes are told one by one
    if program is None:
        raise ConfigError(f"{file}: {_unknown(whole.value)}")
    return formats[program](whole)


def _unknown(document: object) -> str:
    if isinstance(document, dict) and "applications" in document:
        return "a Serve config already; only one of Ray Serve LLM's can be converted"
    return (
        "not a config that can be converted: LiteLLM's has model_list, Ray Serve LLM's "
        "llm_configs, and one of `vllm serve` model and engine arguments"
    )
