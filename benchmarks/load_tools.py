"""The same load by other projects' tools, unchanged, and by `baton bench`: what each says of one service.

The tools come by HTTP, `baton bench` by gRPC; each is installed where it likes and given by its path. All of them run
in turn on the service's machine: what they take of its processors is taken from the service, and is part of what they
see.

  baton up --set model.generation_config=none
  python -m benchmarks.load_tools --aiperf PATH/bin/aiperf --guidellm PATH/bin/guidellm
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from cluster.recall import SHIPPED_MODEL

Report = Mapping[str, Any]
Load = Mapping[str, int]


def aiperf(program: str, url: str, model: str, load: Load, folder: Path) -> dict[str, Any]:
    """NVIDIA's AIPerf."""
    command = [program, "profile", "-m", model, "--url", url, "--endpoint-type", "completions", "--streaming"]
    command += [
        "--tokenizer",
        str(SHIPPED_MODEL),
        "--use-legacy-max-tokens",
        "--use-server-token-count",
        "--ui",
        "none",
    ]
    command += ["--isl", str(load["prompt_tokens"]), "--osl", str(load["output_tokens"])]
    command += ["--concurrency", str(load["concurrency"]), "--request-count", str(load["requests"])]
    # Behind its end the small model says special tokens, and the tool wants a text to each.
    for extra in ("ignore_eos:true", "skip_special_tokens:false", "temperature:0"):
        command += ["--extra-inputs", extra]
    _run([*command, "--output-artifact-dir", str(folder)])
    report: Report = json.loads((folder / "profile_export_aiperf.json").read_text())
    return {
        "version": report["aiperf_version"],
        "succeeded": int(report["request_count"]["avg"]),
        "prompt_tokens": report["input_sequence_length"]["avg"],
        "output_tokens": report["output_sequence_length"]["avg"],
        "requests_per_s": report["request_throughput"]["avg"],
        "ttft_p50_s": report["time_to_first_token"]["p50"] / 1e3,
        "e2e_p50_s": report["request_latency"]["p50"] / 1e3,
    }


def guidellm(program: str, url: str, model: str, load: Load, folder: Path) -> dict[str, Any]:
    """GuideLLM."""
    path = folder / "guidellm.json"
    tokens = f"prompt_tokens={load['prompt_tokens']},output_tokens={load['output_tokens']}"
    command = [program, "run", "--backend", f"kind=openai_http,target={url},model={model}"]
    command += ["--profile", f"kind=concurrent,streams={load['concurrency']}"]
    command += ["--constraint", f"kind=max_requests,count={load['requests']}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={SHIPPED_MODEL}"]
    command += ["--data", f"kind=synthetic_text,{tokens}", "--disable-progress", "--output", f"kind=json,path={path}"]
    _run(command)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    metrics: Report = json.loads(path.read_text())["benchmarks"][0]["metrics"]

    def good(name: str, figure: str) -> float:
        return float(metrics[name]["successful"][figure])

    return {
        "version": version,
        "succeeded": metrics["request_totals"]["successful"],
        "prompt_tokens": good("prompt_token_count", "mean"),
        "output_tokens": good("output_token_count", "mean"),
        "requests_per_s": good("requests_per_second", "mean"),
        "ttft_p50_s": good("time_to_first_token_ms", "median") / 1e3,
        "e2e_p50_s": good("request_latency", "median"),
    }


def baton(address: str, load: Load, folder: Path) -> dict[str, Any]:
    """`baton bench`."""
    path = folder / "baton.json"
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "--server", address, "--output", str(path)]
    for name in ("concurrency", "requests", "prompt_tokens", "output_tokens"):
        command += [f"--{name.replace('_', '-')}", str(load[name])]
    _run(command)
    summary: Report = json.loads(path.read_text())["summary"]
    return {
        "version": "",
        "succeeded": summary["by_status"].get("OK", 0),
        "prompt_tokens": summary["prompt_tokens_per_s"] / summary["requests_per_s"],
        "output_tokens": summary["output_tokens_per_s"] / summary["requests_per_s"],
        "requests_per_s": summary["requests_per_s"],
        "ttft_p50_s": summary["ttft"]["p50"],
        "e2e_p50_s": summary["e2e"]["p50"],
    }


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-1000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tools in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", required=True, metavar="FILE", help="the program")
    parser.add_argument("--guidellm", required=True, metavar="FILE", help="the program")
    parser.add_argument("--server", default="127.0.0.1:50051", help="gRPC (default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="HTTP (default: %(default)s)")
    parser.add_argument("--model", default="recall", help="as it is served (default: %(default)s)")
    for name, default in (("concurrency", 4), ("requests", 40), ("prompt-tokens", 256), ("output-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "load_tools.json")
    args = parser.parse_args(argv)
    # Where the tools are is this machine's affair.
    environment = Environment.capture(
        None, ["python", "-m", "benchmarks.load_tools", "--aiperf", "aiperf", "--guidellm", "guidellm"]
    )
    load = {name: getattr(args, name) for name in ("concurrency", "requests", "prompt_tokens", "output_tokens")}
    tools: dict[str, Callable[[Path], dict[str, Any]]] = {
        "baton bench": lambda folder: baton(args.server, load, folder),
        "aiperf": lambda folder: aiperf(args.aiperf, args.url, args.model, load, folder),
        "guidellm": lambda folder: guidellm(args.guidellm, args.url, args.model, load, folder),
    }
    results = []
    for name, run in tools.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append({"tool": name, **run(Path(folder))})
        print(json.dumps(results[-1]))
    write_json(args.output, to_json("load_tools", environment, load, {"tools": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
