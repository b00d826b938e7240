"""A fake of vLLM 0.32 for tests of whatever starts, watches and ends a server: processes, log and HTTP, no model.

With this folder's parent on ``PYTHONPATH``, ``python -m vllm.entrypoints.openai.api_server`` starts it in a moment.
What goes wrong, and when, is told in JSON through the variable ``FAKE_VLLM`` (:mod:`.behaviour`).
"""

__version__ = "0.32.0"
