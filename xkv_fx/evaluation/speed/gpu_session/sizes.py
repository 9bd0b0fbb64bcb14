"""How large everything in a session is: on a GPU, and in a dry run on a CPU that only shows that the program runs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the stages measure.

    Attributes:
        dtypes: of models, by their names in torch.
        heads: query heads, KV heads, and head size of the kernels that are compared with plain torch.
        kernel_slots: slots of those.
        attention_contexts: slots of the attention that is compared with a copy.
        attention_rows: rows of it.
        preset: the model whose decode steps and prompts are measured; its weights are random.
        context: tokens that every row has seen before its decode steps.
        rows: of the batch; the most that fit when None.
        steps, rounds: decoded tokens that are timed, and repetitions of each attention and prompt.
        prompts: lengths of prompts.
        backend: of our own models.
        target: of the engine.
    """

    dtypes: tuple[str, ...]
    heads: tuple[tuple[int, int, int], ...]
    kernel_slots: tuple[int, ...]
    attention_contexts: tuple[int, ...]
    attention_rows: tuple[int, ...]
    preset: str
    context: int
    rows: int | None
    steps: int
    rounds: int
    prompts: tuple[int, ...]
    backend: str
    target: str


GPU = Sizes(
    dtypes=("bfloat16", "float16", "float32"),
    heads=((32, 8, 128), (9, 3, 64), (6, 2, 96), (16, 1, 256)),
    kernel_slots=(1, 500, 3000),
    attention_contexts=(32_768, 131_072),
    attention_rows=(1, 16, 64),
    preset="llama-3.1-8b",
    context=32_768,
    rows=None,
    steps=16,
    rounds=10,
    prompts=(8_192, 32_768),
    backend="inductor",
    target="aoti",
)
DRY = Sizes(
    dtypes=("float32", "bfloat16"),
    heads=((4, 2, 32),),
    kernel_slots=(20,),
    attention_contexts=(64,),
    attention_rows=(1,),
    preset="tiny",
    context=64,
    rows=1,
    steps=1,
    rounds=1,
    prompts=(32,),
    backend="eager",
    target="pt2",
)


def sizes_for(device: str) -> Sizes:
    """Those of a device's kind."""
    return GPU if device == "cuda" else DRY
