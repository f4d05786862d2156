"""Train the embedded model from nothing, in calls of a few minutes that resume one another.

    python -m dit_sparse.pipelines.embedded.train --state .train --seconds 540
    python -m dit_sparse.pipelines.embedded.train --state .train --export pipelines/embedded/weights

Every call trains until its seconds are over or the plan is done: the VAE and its gate, the text encoder, then the
stages of ``train_transformer.STAGES``. Clips are drawn on the device and never stored. Seeds are fixed; how many
steps fit into a stage's seconds depends on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
import torch.fx.experimental._config

from . import model, state, train_transformer, train_vae, train_words, world
from .optimise import Optimiser

_BEGIN = time.time()


class Run:
    """One call of the training: the parts on their device, what earlier calls did, and the log."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.path = arguments, Path(arguments.state)
        self.device = torch.device(arguments.device)
        self.until = _BEGIN + arguments.seconds - arguments.reserve
        self.path.mkdir(parents=True, exist_ok=True)
        tensors, self.facts = state.load(self.path, self.device)
        self.facts.setdefault("spent", {})
        if any(name.startswith("average.text_encoder.") for name in tensors):
            raise SystemExit(
                f"{self.path} was trained together with its text encoder, by an earlier version of this "
                "program; export it, and go on with --start and a new --state"
            )
        if arguments.again == "words":
            self.facts.pop("words_done", None)
        elif arguments.again:
            self.facts["spent"].pop(arguments.again, None)
        self.facts["calls"] = self.facts.get("calls", 0) + 1
        torch.manual_seed(1000 * self.facts["calls"] + arguments.seed)
        self.vae = model.build_vae().to(self.device)
        self.text_encoder = model.build_text_encoder().to(self.device)
        self.transformer = model.build_transformer(arguments.layers, arguments.heads, arguments.feed_forward).to(
            self.device
        )
        for name in ("vae", "text_encoder", "transformer"):
            if part := state.take(tensors, name):
                getattr(self, name).load_state_dict(part, strict=name != "text_encoder")
        if "norm" in self.facts:
            self.vae.register_to_config(**self.facts["norm"])
        self.average = state.take(tensors, "average")
        self.begun = bool(state.take(tensors, "transformer"))  # the transformer is more than its random start
        if arguments.start and not tensors:
            self._start(Path(arguments.start))

    def _start(self, folder: Path) -> None:
        """Take up VAE and transformer of a Diffusers folder. The text encoder is trained anew: that takes seconds."""
        for name in ("vae", "transformer"):
            module = getattr(self, name)
            module.load_state_dict(type(module).from_pretrained(folder / name).float().state_dict())
        config = json.loads((folder / "vae" / "config.json").read_text())
        norm = {name: config[name] for name in ("latents_mean", "latents_std")}
        self.vae.register_to_config(**norm)
        self.facts.update(vae_done=True, norm=norm)
        self.begun = True

    def log(self, record: dict) -> None:
        """Print a record and append it to the state's log.jsonl."""
        record = {"at": round(time.time() - _BEGIN, 1), "call": self.facts["calls"], **record}
        print(json.dumps(record), flush=True)
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, optimiser: Optimiser | None = None) -> None:
        """Save the state, and copy it to --out if there is one."""
        tensors = state.put("vae", self.vae)
        if self.facts.get("words_done"):
            tensors |= state.put("text_encoder", self.text_encoder)
        if optimiser is not None:
            self.begun, self.average = True, optimiser.averaged()
        if self.begun:
            tensors |= state.put("transformer", self.transformer)
        tensors |= {"average." + name: value.bfloat16() for name, value in self.average.items()}
        state.save(self.path, tensors, self.facts)
        if self.arguments.out:
            state.copy(self.path, self.arguments.out)
            Path(self.arguments.out, "log.jsonl").write_bytes((self.path / "log.jsonl").read_bytes())

    def train_vae(self) -> None:
        """The VAE, its gate, and one continuation if the gate is not passed."""
        a = self.arguments
        if self.facts.get("vae_done"):
            self._more_vae()
            return
        train_vae.train(self.vae, a.vae_seconds, self.log, parts=_scaled(train_vae.PARTS, a.scale))
        gates = train_vae.gate(self.vae, self.log, _scaled_gates(a.scale))
        if not train_vae.passes(gates) and a.vae_extra > 0:
            train_vae.train(self.vae, a.vae_extra, self.log, parts=_scaled(train_vae.PARTS[1:], a.scale))
            gates = train_vae.gate(self.vae, self.log, _scaled_gates(a.scale))
        self.log(dict(stage="gate", passed=train_vae.passes(gates)))
        norm = {name: self.vae.config[name] for name in ("latents_mean", "latents_std")}
        self.facts.update(vae_done=True, gate=gates, norm=norm)
        self.save()

    def _more_vae(self) -> None:
        """Improve a VAE that a transformer was already trained on: its latents are held where they were."""
        a = self.arguments
        if self.facts["spent"].get("vae_more", 0) >= a.vae_more - 1:
            return
        norm = {name: self.vae.config[name] for name in ("latents_mean", "latents_std")}
        parts = _scaled(train_vae.PARTS, a.scale)
        train_vae.train(self.vae, a.vae_more, self.log, parts=parts, anchor=True)
        self.vae.register_to_config(**norm)
        gates = train_vae.gate(self.vae, self.log, _scaled_gates(a.scale))
        self.log(dict(stage="gate", passed=train_vae.passes(gates)))
        self.facts["gate"] = gates
        self.facts["spent"]["vae_more"] = a.vae_more

    def train_words(self) -> None:
        """The text encoder, once and from nothing; a call that is too short for it leaves it to the next one."""
        seconds = self.arguments.words_seconds
        if self.facts.get("words_done"):
            return
        if time.time() + seconds > self.until:
            raise SystemExit(f"too little time is left for the text encoder ({seconds:g} s): call again")
        self.text_encoder = model.build_text_encoder().to(self.device)
        train_words.train(self.text_encoder, seconds, self.log)
        self.facts["words_done"] = True
        self.save()

    def train_transformer(self) -> None:
        """The stages that are not done yet, as far as the time goes."""
        a = self.arguments
        self.vae.requires_grad_(False), self.text_encoder.requires_grad_(False)
        optimiser = Optimiser({"transformer": self.transformer}, a.matrix_lr > 0)
        if self.average:
            optimiser.load_average(self.average)
        if a.compile:
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        parts = dict(vae=self.vae, transformer=self.transformer, text_encoder=self.text_encoder)
        parts["tables"] = world.TokenTables(self.device)
        rates = (a.lr, a.matrix_lr)
        session = train_transformer.Session(parts, optimiser, self.log, rates, a.wide, self.facts["calls"])
        for stage in _plan(a):
            spent = self.facts["spent"].get(stage.name, 0.0)
            if spent >= stage.seconds - 1 or time.time() > self.until - 10 * (a.scale == 1):
                continue

            if a.finish:
                stage = dataclasses.replace(stage, seconds=min(stage.seconds, spent + self.until - time.time()))

            def keep(total: float, name: str = stage.name) -> None:
                self.facts["spent"][name] = total
                self.save(optimiser)

            total = train_transformer.train(stage, spent, self.until, session, keep)
            keep(total)


def _scaled(parts, scale: float):
    """The same parts, smaller: for rehearsals on a CPU."""
    if scale == 1:
        return parts
    return tuple(dataclasses.replace(p, size=64, window=32, batch=2, frames=min(p.frames, 5)) for p in parts)


def _scaled_gates(scale: float):
    return train_vae.GATES if scale == 1 else ((64, 17, 2),)


def _plan(a: argparse.Namespace) -> list[train_transformer.Stage]:
    seconds = {name: float(value) for name, value in (pair.split("=") for pair in a.stages.split(",") if pair)}
    plan = []
    for stage in train_transformer.STAGES:
        sources = stage.sources
        if a.scale != 1:
            sources = tuple(
                (
                    dataclasses.replace(
                        s,
                        size=max(32, int(s.size * a.scale)),
                        batch=2,
                        ring=4,
                        fresh=2,
                        frames=min(s.frames, 5),
                    ),
                    w,
                )
                for s, w in sources
            )
        plan.append(dataclasses.replace(stage, seconds=seconds.get(stage.name, stage.seconds), sources=sources))
    return plan


def load_parts(path: Path | str, device: torch.device | str = "cpu", shipped: bool = True):
    """The VAE, text encoder and transformer of a saved state, with the averaged weights, in eval mode.

    With `shipped`, weights are rounded to bf16 as in the shipped folder, and held in fp32.

    Raises:
        FileNotFoundError: when the folder holds no state with a transformer.
    """
    tensors, facts = state.load(path, device)
    average = state.take(tensors, "average")
    if not average:
        raise FileNotFoundError(f"no trained transformer in {path}")
    vae, text_encoder, transformer = model.build_vae(), model.build_text_encoder(), model.build_transformer()
    vae.load_state_dict(state.take(tensors, "vae"))
    vae.register_to_config(**facts["norm"])
    transformer.load_state_dict(state.take(average, "transformer"))
    # States of earlier versions hold an average of the text encoder too: it was trained with the transformer.
    words = state.take(average, "text_encoder") or state.take(tensors, "text_encoder")
    text_encoder.load_state_dict(words, strict=False)
    parts = [part.to(device).eval() for part in (vae, text_encoder, transformer)]
    if shipped:
        for part in parts:
            for tensor in part.parameters():
                tensor.data = tensor.data.bfloat16().float()
    return parts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", default=".train", help="folder of the state to resume from")
    parser.add_argument("--out", default="", help="folder that gets a copy of the state whenever it is saved")
    parser.add_argument("--start", default="", help="a Diffusers folder to go on from when there is no state")
    parser.add_argument("--export", default="", help="write the Diffusers folder from the state, and train nothing")
    parser.add_argument("--seconds", type=float, default=535, help="of this call, from the start of the process")
    parser.add_argument("--reserve", type=float, default=8, help="seconds kept for the last save")
    parser.add_argument("--vae-seconds", type=float, default=100)
    parser.add_argument("--vae-extra", type=float, default=40, help="more seconds if the gate is not passed")
    parser.add_argument("--vae-more", type=float, default=0, help="seconds that a later call adds to the VAE")
    parser.add_argument("--words-seconds", type=float, default=40, help="at most, for the text encoder")
    parser.add_argument("--stages", default="", help="seconds by stage, such as images=60,preview=400,long=150")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--matrix-lr", type=float, default=2e-3, help="Muon's; 0 trains everything with AdamW")
    parser.add_argument("--again", default="", help="a stage to train once more, as if nothing were spent on it")
    parser.add_argument(
        "--finish", action="store_true", help="the stage that is begun ends with this call, rates and all"
    )
    parser.add_argument("--wide", type=float, default=0.08, help="share of steps with text padded to 512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=768)
    parser.add_argument("--scale", type=float, default=1, help="below 1: tiny clips, to rehearse on a CPU")
    parser.add_argument("--attention", default="", help="flash or cudnn: leave PyTorch no other choice")
    parser.add_argument("--compile", type=int, default=int(torch.cuda.is_available()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.words_seconds <= 0:
        parser.error(f"--words-seconds {arguments.words_seconds:g} is not allowed; use a number above 0")
    return arguments


def fast_settings(attention: str = "") -> None:
    """TF32 where fp32 is left, tuned convolutions, and the attention kernel that measured fastest ("" for any)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # Two dimensions that happen to be equal in the first clips (256 tokens, 256 channels) are not the same dimension.
    torch.fx.experimental._config.use_duck_shape = False
    if attention:
        torch.backends.cuda.enable_flash_sdp(attention == "flash")
        torch.backends.cuda.enable_cudnn_sdp(attention == "cudnn")


def main() -> None:
    """Run the command line."""
    arguments = _arguments()
    if arguments.export:
        vae, text_encoder, transformer = load_parts(arguments.state)
        model.save_folder(arguments.export, vae, text_encoder, transformer)
        return
    fast_settings(arguments.attention)
    run = Run(arguments)
    run.log(dict(stage="start", device=str(run.device), spent=run.facts["spent"], seconds=arguments.seconds))
    run.train_vae()
    run.train_words()
    run.train_transformer()


if __name__ == "__main__":
    main()
