"""The command ``vllm``, as far as a node that only computes needs it: ``vllm serve --headless --node-rank K ...``.

As in vLLM it has workers and no engine, ends when one of them ends, and then ends the others.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from ...behaviour import read_behaviour
from ...processes import join_nodes, say, start_workers
from ...sizes import add_options, read_sizes


def main() -> None:
    """Start the workers of this node and wait for them."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("subcommand", choices=["serve"])
    parser.add_argument("--headless", action="store_true", required=True)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    add_options(parser)
    arguments = parser.parse_known_args()[0]
    behaviour = read_behaviour("", arguments.node_rank)
    if (ending := behaviour.exit_at_start) is not None:
        lines = ending.get("log", [])
        assert isinstance(lines, list)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        raise SystemExit(ending.get("code", 1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sizes = read_sizes(arguments, moe=behaviour.moe)
    text = f"Launching vLLM (v0.32.0) headless multiproc executor, with head node address {arguments.master_addr}"
    say("vllm", "serve.py:224", text)
    meeting = f"{arguments.master_addr}:{arguments.master_port}"
    workers = start_workers(sizes, behaviour, nodes=arguments.nnodes, node_rank=arguments.node_rank, meeting=meeting)
    join_nodes(arguments.master_addr, arguments.master_port)
    try:
        os.wait()
    finally:
        for pid in workers:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue


if __name__ == "__main__":
    main()
