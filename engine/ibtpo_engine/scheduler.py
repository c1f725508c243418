"""Continuous batching over branches of any number of trees.

Every step runs one forward pass over two kinds of rows and then samples one token for every running branch:

- *decode* rows: the last token of each running branch, in depth-first order so that siblings are neighbours;
- *fill* rows: known tokens without keys and values (a prompt, a preempted branch, a node whose KV was dropped), a chunk
  at a time; or the last token of a node whose final hidden state several children need.

A branch waits until every node above it is filled. Its first token is sampled from its parent's final hidden state,
which is computed once and shared by all the children. If that state is unknown and no other child needs it, the branch
runs at once, and its first decode row repeats the parent's last token.
"""

from __future__ import annotations

import numpy as np
import torch

from ibtpo_engine.arrays import Longs
from ibtpo_engine.branches import Branch, Chunk, Fill, chunk_rows
from ibtpo_engine.cache import PageCache, is_computed
from ibtpo_engine.errors import BranchFailed
from ibtpo_engine.given import record_scores
from ibtpo_engine.pages import PAGE, pages_for
from ibtpo_engine.roster import Roster
from ibtpo_engine.runner import Rows, Runner
from ibtpo_engine.slots import FINISH, LACKS_PAGE, Slots
from ibtpo_engine.tree import Node
from ibtpo_kernels import DecodeRun

FILL_SLOTS = 64  # most nodes filled in one step
ENDED_SHARE = 4  # a call of several steps continues until more than 1 / ENDED_SHARE of its branches have ended


class Scheduler(Roster):
    """Runs branches to their end, a step at a time.

    Args:
        runner: the model over the pool.
        cache: the pool with its index.
        max_branches: most branches decoded in one step.
        fill_tokens: most fill rows in one step.
        max_pages: longest path, in pages.
    """

    def __init__(
        self, runner: Runner, cache: PageCache, *, max_branches: int, fill_tokens: int, max_pages: int
    ) -> None:
        super().__init__(cache, Slots(max_branches + FILL_SLOTS, max_pages, runner.model.device))
        self.runner = runner
        self.max_branches = max_branches
        self.fill_tokens = fill_tokens
        self.failures: list[BranchFailed] = []  # of the steps taken; the reader removes them
        self._planned: Longs | None = None  # the running slots that the runner's plan is for

    # ---- what the engine calls -------------------------------------------------------------------------------

    @property
    def is_plain(self) -> bool:
        """Will the next step be decode rows run natively and nothing else?"""
        waits = self.waiting or self.fills or self.slots.features
        return bool(self.running) and not waits and self.runner.is_native

    def step(self, version: int, most: int = 1) -> list[Node] | None:
        """Run one forward pass and sample; up to `most` passes in one call, as long as few branches end.

        Returns:
            The nodes that finished, filled with their tokens and marked with `version`; None if nothing could be run
            because pages are short.
        """
        ready: list[Branch] = []
        try:
            self._admit(ready)
            if self.running and not ready and not self.fills and self.runner.has_step:
                return self._decode(version, most)
            self._grow()
            chunks, decoding = self._chunks(), self._decoding_slots()
            with self.runner.threads(len(decoding) + sum(map(len, chunks)) + len(ready)):
                hidden = self._forward(decoding, chunks)
                scored = self._complete(len(decoding), chunks, hidden, ready, version)
                started = self._start(ready)
                if hidden is None and not (started or scored or self.running):
                    return None
                return scored + self._sample(decoding, hidden, started, version)
        except BaseException:  # an interrupt, or logits that are NaN: branches about to start wait again
            for branch in ready:
                if branch.node.in_flight and branch not in self.waiting and not self.is_running(branch):
                    self._wait_again(branch)
            raise

    def pages_wanted(self) -> int:
        """Pages the oldest waiting branch needs to go on, for the error about a full pool."""
        branch = self.waiting[0]
        node = self._blocker(branch)
        if node is not None:
            return pages_for(node.end) - node.start // PAGE
        known = len(branch.kept[0]) if branch.kept else 0
        return pages_for(branch.node.start + known + 1) - branch.node.start // PAGE

    # ---- admission -------------------------------------------------------------------------------------------

    def _admit(self, ready: list[Branch]) -> None:
        """Look at the oldest waiting branches: begin the fills they need; add to `ready` those that can start at once.

        Pages go strictly by age: once a branch has to wait for pages, no younger one gets any. Otherwise younger ones
        could take the pages freed for it again and again.
        """
        if not self.waiting:
            return
        room = self.max_branches - (self.num_branches - len(self.waiting))
        filling_prompts = {fill.tokens.tobytes() for fill in self.fills.values() if fill.start == 0}
        for branch in self.waiting[: max(room, 0) + FILL_SLOTS]:
            if room <= 0:
                return
            blocker = self._blocker(branch)
            if blocker is None:
                if not self._begin(branch, ready):
                    return
            elif self._must_wait(blocker, filling_prompts):
                continue
            elif not self._fill_node(blocker):
                return
            elif blocker is branch.node.parent and branch.kept is None:  # else its own tokens are filled next
                self.fills[id(blocker)].children.append(branch)
            else:
                continue
            self.waiting.remove(branch)
            room -= 1

    def _begin(self, branch: Branch, ready: list[Branch]) -> bool:
        """Give a branch whose path is computed its first pages; False if pages are short."""
        if branch.kept is not None:
            return self._fill_branch(branch)
        parent = branch.node.parent
        assert parent is not None
        branch.kv = self.cache.open(branch.node, branch.node.start + 1)
        if branch.kv is None:
            return False
        if parent.kv.hidden is None or (self.runner.has_step and not self.fills):
            self._take_slot(branch, branch.kv)
            self._join(branch)
        else:
            ready.append(branch)
        return True

    def _blocker(self, branch: Branch) -> Node | None:
        """The node that must be filled before the branch can go on; None if it can."""
        parent = branch.node.parent
        assert parent is not None
        if is_computed(parent):  # then so is everything above it
            if parent.kv.hidden is not None or (branch.kept is not None and not branch.is_given):
                return None  # before looking at siblings: this runs for every waiting branch in every step
            others = any(child.in_flight for child in parent.children if child is not branch.node)
            return parent if branch.is_given or others else None
        while parent.parent is not None and not is_computed(parent.parent):
            parent = parent.parent
        return parent

    def _must_wait(self, node: Node, filling_prompts: set[bytes]) -> bool:
        """Must filling a node wait, for another reason than pages?"""
        if id(node) in self.fills:
            return False
        if self.slots.num_free <= self.max_branches - len(self.running):  # keep slots for the branches
            return True
        if node.parent is None:
            prompt = node.tokens.tobytes()
            if node.kv is None and prompt in filling_prompts:
                return True  # the same prompt is being filled: it will be found in the index afterwards
            filling_prompts.add(prompt)
        return False

    def _fill_node(self, node: Node) -> bool:
        """Begin to fill a node, unless it is being filled already; False if pages are short."""
        if id(node) in self.fills:
            return True
        if not self._give_pages(node):
            return False
        slot = self.slots.take(self.cache.path_pages(node))
        self.fills[id(node)] = Fill(node.kv, node.tokens, node.start, slot, node)
        return True

    def _give_pages(self, node: Node) -> bool:
        if node.kv is not None:
            return self.cache.cover(node.kv, node.end)
        node.kv = self.cache.open_root(node) if node.parent is None else self.cache.open(node, node.end)
        return node.kv is not None

    def _fill_branch(self, branch: Branch) -> bool:
        """Begin to fill what a preempted branch had sampled; with room for one more token, to ensure progress."""
        assert branch.kept is not None
        start, tokens = branch.node.start, branch.kept[0]
        kv = self.cache.open(branch.node, min(start + len(tokens) + 1, branch.limit))
        if kv is None:
            return False
        self._take_slot(branch, kv)
        self.slots.restore(branch.slot, branch.kept)
        branch.kept = None
        self.fills[id(branch)] = Fill(kv, tokens, start, branch.slot, branch.node, branch)
        return True

    # ---- one step --------------------------------------------------------------------------------------------

    def _decoding_slots(self) -> Longs:
        slots = self.running_slots()
        if slots is not self._planned:
            self.runner.invalidate()
            self._planned = slots  # last: an interrupt before must not leave an older plan
        return slots

    def _grow(self) -> None:
        """Give every running branch whose next row begins a page that page; preempt the youngest if pages are short."""
        lacking, pool = self._lacking_branches(), self.cache.pool
        self.lacking = None  # looked up again unless the next step reports it
        if len(lacking) <= pool.num_free:  # nearly always
            for branch, page in zip(lacking, pool.allocate(len(lacking)), strict=True):
                self._give_page(branch, page)
            lacking = []
        for branch in lacking:
            while self.is_running(branch):
                fresh = self.cache.take(1)
                if fresh is not None:
                    self._give_page(branch, fresh[0])
                    break
                self._preempt(max(self.running.values(), key=lambda running: running.ticket))

    def _lacking_branches(self) -> list[Branch]:
        if self.lacking is not None:
            return [branch for branch in self.lacking if self.is_running(branch)]
        slots, decoding = self.slots, self._decoding_slots()
        columns = (slots.length[decoding] - 1) // PAGE
        return [self.running[slot] for slot in decoding[slots.table[decoding, columns] < 0].tolist()]

    def _give_page(self, branch: Branch, page: int) -> None:
        assert branch.kv is not None
        self.slots.add_page(branch.slot, branch.kv.first + len(branch.kv.pages), page)
        branch.kv.pages.append(page)

    def _decode(self, version: int, most: int) -> list[Node]:
        """Run at most `most` steps of decode rows only, in one call, which may hand out free pages as it goes."""
        self.runner.announce(len(self.running))
        self._grow()
        decoding = self._decoding_slots()
        if len(decoding) == 0:  # the last one was preempted
            return []
        if self.slots.features:
            return self._decode_apart(decoding, version)
        run = self.runner.decode(self.slots, decoding) if most == 1 else self._run_on(decoding, most)
        self.counters.steps += run.steps
        self.counters.computed += run.rows
        self.counters.sampled += run.rows
        coded = [(self.running[int(decoding[place])], code) for place, code in run.events]
        self.lacking = [branch for branch, code in coded if code == LACKS_PAGE]
        return self._end_all([(branch, code) for branch, code in coded if code != LACKS_PAGE], version)

    def _run_on(self, decoding: Longs, most: int) -> DecodeRun:
        """Several steps, in which branches that begin a page get a free one."""
        pool, paged = self.cache.pool, []
        spare = pool.allocate(min(len(decoding), pool.num_free))
        try:
            most_ended = len(decoding) // ENDED_SHARE
            run = self.runner.decode(self.slots, decoding, most, most_ended=most_ended, spare=np.array(spare, np.int32))
            paged = run.paged
        finally:
            pool.release(spare[len(paged) :][::-1])
        for place, page in zip(paged, spare, strict=False):
            self.running[int(decoding[place])].kv.pages.append(page)  # type: ignore[union-attr]
        return run

    def _decode_apart(self, decoding: Longs, version: int) -> list[Node]:
        """As `_decode`, one step, if branches have features: those with shaped logits run in torch, others natively.

        Rows in torch run and draw before any token is recorded, so that an error leaves all branches in the same place.
        """
        slots = self.slots
        plain, shaped = slots.features.split(decoding, slots.length)
        self.lacking = None
        hidden = self._forward(shaped, [])
        drawn = None if hidden is None else slots.draw(shaped, self.runner.logits(hidden))
        code = np.zeros(len(plain), np.int64)
        if len(plain):
            for place, what in self.runner.decode(slots, plain).events:
                code[place] = what if what != LACKS_PAGE else 0
            self.counters.steps += hidden is None
            self.counters.computed += len(plain)
        if drawn is not None:
            code = np.concatenate([code, slots.record(shaped, *drawn)])
        self.counters.sampled += len(decoding)
        return self._settle(np.concatenate([plain, shaped]), code, [], version)

    def _chunks(self) -> list[Chunk]:
        """What each fill computes in this step, the older ones first."""
        budget, chunks = self.fill_tokens, []
        for fill in self.fills.values():
            chunk = fill.chunk(budget)
            budget -= len(chunk)
            chunks.append(chunk)
        return chunks

    def _forward(self, decoding: Longs, chunks: list[Chunk]) -> torch.Tensor | None:
        """Hidden states of the decode rows, then of each chunk; None if there is no row."""
        tokens, pos, address = self.slots.next_rows(decoding)
        rows = Rows(tokens.astype(np.int64), pos.astype(np.int64), address, decoding.astype(np.int32))
        if chunks:
            rows = rows.followed_by(chunk_rows(chunks, self.slots.table))
        if len(rows.tokens) == 0:
            return None
        if chunks:
            self.runner.invalidate()
        hidden = self.runner.forward(rows, self.slots.planner)
        if chunks:
            self.runner.invalidate()
        self.counters.steps += 1
        self.counters.computed += len(rows.tokens)
        return hidden

    def _complete(
        self, num_decoding: int, chunks: list[Chunk], hidden: torch.Tensor | None, ready: list[Branch], version: int
    ) -> list[Node]:
        """Account for the chunks just run; adds the children of filled nodes to `ready`, returns the scored nodes."""
        row, scored, filled = num_decoding, [], []
        for chunk in chunks:
            fill = chunk.fill
            row += len(chunk)
            if fill.branch is not None and fill.branch.is_given and (len(chunk) or fill.end == fill.start):
                rows = None if hidden is None else hidden[row - len(chunk) : row]
                record_scores(self.slots, self.runner, fill, chunk.depths(), rows)
            if len(chunk):
                fill.reached(chunk.end)
            if fill.computed < fill.end or (len(chunk) == 0 and fill.branch is None):
                continue
            if fill.branch is not None:
                del self.fills[id(fill.branch)]
                self._join(fill.branch)
                if fill.branch.is_given:
                    scored.append(self.end(fill.branch, "scored", version))
            else:
                filled.append((fill, row - 1))
        if filled:
            assert hidden is not None
            last = torch.tensor([row for _, row in filled], device=hidden.device)
            for (fill, _), state in zip(filled, hidden.index_select(0, last).unbind(), strict=True):
                fill.kv.hidden = state
                ready += self._drop_fill(id(fill.node)).children
                if fill.node.parent is None:
                    self.cache.remember(fill.node.tree)
        return scored

    def _start(self, ready: list[Branch]) -> list[Branch]:
        """Give each branch a slot and the page for its first token; those that get no page wait again."""
        started = []
        for branch in ready:
            kv = branch.kv or self.cache.open(branch.node, branch.node.start + 1)
            if kv is None:
                self._wait_again(branch)
            else:
                self._take_slot(branch, kv)
                started.append(branch)
        return started

    def _sample(self, decoding: Longs, hidden: torch.Tensor | None, started: list[Branch], version: int) -> list[Node]:
        """Draw a token for every decoding and every just started branch."""
        slots, chosen, num_decoding = self.slots, decoding, len(decoding)
        states = [] if hidden is None else [hidden[:num_decoding]]
        pick = None
        if started:
            chosen = np.concatenate([chosen, np.array([branch.slot for branch in started], np.int64)])
            parents = {id(branch.node.parent): branch.node.parent for branch in started}
            states.append(torch.stack([parent.kv.hidden for parent in parents.values()]))  # type: ignore[union-attr]
            place = {key: num_decoding + i for i, key in enumerate(parents)}
            pick = [*range(num_decoding), *(place[id(branch.node.parent)] for branch in started)]
        if len(chosen) == 0:
            return []
        state = states[0] if len(states) == 1 else torch.cat(states)
        logits = self.runner.logits(state)
        if pick is not None:
            logits = logits.index_select(0, torch.tensor(pick, device=logits.device))
        drawn = slots.draw(chosen, logits)
        self.lacking = None
        code = slots.record(chosen, *drawn)
        self.counters.sampled += len(chosen)
        return self._settle(chosen, code, started, version)

    def _settle(self, chosen: Longs, code: Longs, started: list[Branch], version: int) -> list[Node]:
        """Let started branches join the running ones, then remove those that finished."""
        for branch in started:
            self._join(branch)
        errors = self.slots.follow(chosen, code) if self.slots.features else []
        failed = [(self.running[slot].node, error) for slot, error in errors]
        ends = np.flatnonzero(code)
        coded = zip(chosen[ends].tolist(), code[ends].tolist(), strict=True)
        finished = self._end_all([(self.running[slot], what) for slot, what in coded], version)
        for node, error in failed:
            if not isinstance(error, Exception):
                raise error
            self.failures.append(BranchFailed(node, error))
        return finished

    def _end_all(self, ended: list[tuple[Branch, int]], version: int) -> list[Node]:
        """End these branches, as their codes say."""
        finished = []
        for branch, code in ended:
            finish = FINISH[code]
            finished.append(self.end(branch, branch.at_limit if finish == "length" else finish, version))
        return finished
