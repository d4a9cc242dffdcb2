"""Drafts that are known to be right, or wrong, whatever the drafter finds."""

from __future__ import annotations

from typing import Any

from attn_backends.adapter.proposer import SelfProposer

VOCAB_SIZE = 49_152  # of the demo model


def replace_drafts(answers: list[tuple[list[int], list[int]]], right: bool) -> None:
    """From now on the drafts of this process are read from answers.

    Args:
        answers: prompts and their greedy answers, longer than what will be asked for by a step.
        right: or each token is another one.
    """
    by_prompt = {tuple(prompt): answer for prompt, answer in answers}
    propose = SelfProposer.propose

    def from_answers(self: Any, num_speculative_tokens: int, **step: Any) -> list[list[int]]:
        drafts = propose(self, num_speculative_tokens, **step)
        lengths, rejected = step["common_attn_metadata"].seq_lens, step["num_rejected_tokens_gpu"]
        if rejected is not None:
            lengths = lengths - rejected
        batch = self._runner.input_batch
        for row, drafted in enumerate(drafts):
            if not drafted:
                continue
            prompt = batch.token_ids_cpu[row, : batch.num_prompt_tokens[row]].tolist()
            first = int(lengths[row]) + 1 - len(prompt)  # behind what was sampled last
            known = by_prompt[tuple(prompt)][first : first + len(drafted)]
            assert len(known) == len(drafted), "the answers end too early"
            drafts[row] = known if right else [(token + 1) % VOCAB_SIZE for token in known]
        return drafts

    SelfProposer.propose = from_answers  # type: ignore[assignment]
