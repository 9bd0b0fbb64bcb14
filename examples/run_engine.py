"""Run an engine with torch alone: neither xkv_fx nor transformers can be imported here.

    python examples/run_engine.py ENGINE 1,15,27,9 --new 16

prints the token ids that are generated, greedily, behind the prompt's. An engine is executable code: do not run one
that you would not run as a program.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


class _Blocked:
    """Shows that nothing below needs them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("xkv_fx", "transformers"):
            raise ImportError(f"{name} is not needed to run an engine")


sys.meta_path.insert(0, _Blocked())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", type=Path)
    parser.add_argument("tokens", help="the prompt's token ids, separated by commas")
    parser.add_argument("--new", type=int, default=16)
    options = parser.parse_args()

    manifest = json.loads((options.engine / "manifest.json").read_text())
    device = manifest["machine"]["device"]
    weights = load_file(options.engine / "weights.safetensors", device=device)
    call, taken, state = {}, {}, []
    for kind in ("prefill", "decode"):  # "extend" has prefill's inputs, and goes on from what the state holds
        package = manifest["packages"][kind]
        call[kind] = torch._inductor.aoti_load_package(str(options.engine / package["file"]))
        taken[kind] = [weights[name] for name in package["weights"]]
    for spec in package["inputs"][2:]:  # a session: buffers that the graphs read and change
        buffer = torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"]), device=device)
        if spec["name"].startswith("positions_"):
            buffer += torch.arange(spec["shape"][2], dtype=buffer.dtype, device=device)
        state.append(buffer)

    prompt = [int(token) for token in options.tokens.split(",")]
    rows, padding = manifest["batch_size"], max(0, manifest["shortest"] - len(prompt))
    ids = torch.tensor([prompt + [0] * padding] * rows, device=device)
    positions = torch.arange(ids.shape[1], device=device).expand(rows, -1).contiguous()
    valid = positions < len(prompt)
    with torch.no_grad():
        logits = call["prefill"](*taken["prefill"], ids, positions, valid, *state)
        generated = [logits[:, -1].argmax(-1, keepdim=True)]
        while len(generated) < options.new and int(generated[-1][0]) not in manifest["end_tokens"]:
            place = torch.full_like(generated[-1], len(prompt) + len(generated) - 1)
            logits = call["decode"](*taken["decode"], generated[-1], place, *state)
            generated.append(logits[:, -1].argmax(-1, keepdim=True))
    print(",".join(str(int(token[0])) for token in generated))


main()
