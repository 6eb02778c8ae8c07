"""Plants known bugs in a copy of the package, one at a time, and shows which test catches each.

Run from the repository's root: ``python tests/plant_bugs.py [part of a name ...]``. Exit status 1 if a bug survives, or if its place in
the source is gone. A bug that a test let through belongs in this list, with the law that now catches it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # names of test files, without "test_" and ".py"


BUGS = [
    # rows
    Bug(
        "distances by the float32 Gram identity",
        "numerics/rows.py",
        "products.addmm_(wide, wide.T)",
        "products.add_((wide.float() @ wide.float().T).double())",
        "rows",
    ),
    Bug("float64 rows not centred", "numerics/rows.py", "wide -= median_of_rows(wide)", "wide += 0", "rows"),
    Bug("rows centred by their mean", "numerics/rows.py", "wide -= median_of_rows(wide)", "wide -= wide.mean(0)", "rows"),
    Bug("clipped rows' distances from base distances", "numerics/rows.py", "None or not self._keeps_shifts()", "None", "rows"),
    Bug(
        "combine reads rows of weight 0",
        "numerics/rows.py",
        "in enumerate(weights.tolist()) if weight]",
        "in enumerate(weights.tolist())]",
        "rows",
    ),
    Bug("only the last block counts in distances", "numerics/rows.py", "products.addmm_(wide, wide.T)", "products = wide @ wide.T", "rows"),
    Bug("only the last float32 products count", "numerics/rows.py", "products += product", "products = product", "rows"),
    Bug("close rows keep their float32 products", "numerics/rows.py", "if bool(close.any()):", "if False:", "rows"),
    Bug("float32 products of tiny rows", "numerics/rows.py", " & (both > _FAINT)", "", "rows"),
    Bug("only the last block counts in norms", "numerics/rows.py", "squares += torch.stack(sums)", "squares = torch.stack(sums)", "rows"),
    Bug("norms that leave float32's range", "numerics/rows.py", "if bool(unsure.any()):", "if False:", "rows"),
    Bug("norms of shifted rows", "numerics/rows.py", "None if self.work_dtype == torch.float64 else self._known", "self._known", "rows"),
    Bug("only the last block is looked at for nan", "numerics/rows.py", "bad |= torch", "bad = torch", "rows"),
    Bug("distances not agreed on", "numerics/rows.py", "return self.agree(distances)", "return distances", "rows"),
    Bug("sums over this slice only", "numerics/rows.py", "return self.total(partial)", "return partial", "aggregators"),
    Bug("selecting from selected rows", "numerics/rows.py", "keep if self.index is None else self.index[keep]", "keep", "rows"),
    Bug("rows that are far larger are not shrunk", "numerics/rows.py", "if not bool(beyond.any()):", "if True:", "aggregators"),
    Bug("products of rows of any size", "numerics/rows.py", "wide /= self.unit", "wide /= 1", "aggregators"),
    Bug(
        "norms of rows of any size",
        "numerics/rows.py",
        "(part / self.unit for part in parts)",
        "(part / 1 for part in parts)",
        "aggregators",
    ),
    Bug("shrunk rows are combined as they were", "numerics/rows.py", "weights = weights * self._base(self.scales)", "pass", "aggregators"),
    Bug("the largest row says which are far larger", "numerics/rows.py", "usual = ordered[-1 - f]", "usual = ordered[-1]", "aggregators"),
    Bug(
        "sizes of rows in this slice only",
        "numerics/rows.py",
        "self.agree(self.sum(largest * 2.0**-32))",
        "largest * 2.0**-32",
        "aggregators",
    ),
    Bug("norms that underflow", "numerics/rows.py", "~((squares > 2.0**-900) & squares.isfinite())", "~squares.isfinite()", "aggregators"),
    Bug("means whose sums overflow", "numerics/rows.py", "if averages and not bool(all_finite(out)):", "if False:", "aggregators"),
    # rules
    Bug(
        "shares are checked before rows are silent only",
        "aggregators/base.py",
        "if left.shares is None else min(self.most_f(heard), _most_below_half(left.shares))",
        "",
        "aggregators",
    ),
    Bug("weights of any sum", "aggregators/base.py", " and total <= 1 + 1e-3", "", "aggregators"),
    Bug("a clipping length in no unit", "aggregators/centered_clipping.py", "self.tau / rows.unit", "self.tau", "aggregators"),
    Bug("smoothing in no unit", "aggregators/geometric_median.py", "self.nu / rows.unit if", "self.nu if", "aggregators"),
    Bug(
        "who abstains votes",
        "aggregators/majority_vote.py",
        "((block != 0).sum(0) > f)",
        "((block != 0).sum(0) >= 0)",
        "papers",
    ),
    Bug("zeros always vote +1", "algorithms/signsgd_majority_vote.py", "and round.step % 2:", "and False:", "papers"),
    Bug(
        "a payload is not held to its layout",
        "engine/worker_side.py",
        "codec.check(payload, len(x), x.dtype)",
        "pass",
        "exchange",
    ),
    Bug(
        "a mean whose f was left open", "aggregators/coordinate_wise.py", 'object.__setattr__(self, "f", 0)', "pass", "aggregators"
    ),
    Bug(
        "median takes the lower middle",
        "numerics/order_statistics.py",
        "ordered[n // 2].clone() if n % 2 else ordered[n // 2 - 1] / 2 + ordered[n // 2] / 2",
        "ordered[(n - 1) // 2].clone()",
        "rows",
    ),
    Bug(
        "a comparator missing",
        "numerics/order_statistics.py",
        "for i in range(min(k, n - j - k)):",
        "for i in range(min(k, n - j - k - 1)):",
        "rows",
    ),
    Bug(
        "more than a pair left unordered",
        "numerics/order_statistics.py",
        "if not (ordered or kept) and wanted == {low, high}:",
        "if not (ordered or kept):",
        "rows",
    ),
    Bug(
        "the rest of a block put where its first columns belong",
        "numerics/rows.py",
        "first, part, whole = first + whole * size, part[:, whole * size :], 0",
        "part, whole = part[:, whole * size :], 0",
        "rows",
    ),
    Bug(
        "trimmed mean off by one",
        "aggregators/coordinate_wise.py",
        "_mean(sorted_rows(block, f, n - f, ordered=False))",
        "_mean(sorted_rows(block, f, n - f + 1, ordered=False))",
        "aggregators",
    ),
    Bug(
        "f shrinks although more than f rows are silent",
        "aggregators/base.py",
        "least - quiet if quiet <= least else least",
        "max(0, least - quiet)",
        "aggregators",
    ),
    Bug(
        "the window of nearest values never moves",
        "aggregators/coordinate_wise.py",
        "enumerate(ordered[keep:]):",
        "():",
        "aggregators",
    ),
    Bug(
        "quantized codes beyond the levels are valid",
        "compressors/quantization.py",
        "<= 2 * self.levels).all()",
        ">= 0).all()",
        "compressors",
    ),
    Bug(
        "MinMax stops at the mean distance", "attacks/messages.py", "(pairs.max() - to_mean)", "(pairs.mean() - to_mean)", "attacks"
    ),
    Bug(
        "undone momentum forgets the last aggregate",
        "algorithms/robust_sgd.py",
        "(a - beta * state.a)",
        "(a - beta * a)",
        "algorithms",
    ),
    Bug(
        "Krum counts n - f - 1 neighbours",
        "aggregators/krum.py",
        "1 : 1 + n - f - definition.fewer]",
        "1 : 2 + n - f - definition.fewer]",
        "aggregators",
    ),
    Bug(
        "Krum counts the row itself",
        "aggregators/krum.py",
        "1 : 1 + n - f - definition.fewer]",
        "0 : n - f - definition.fewer]",
        "aggregators",
    ),
    Bug(
        "Multi-Krum averages n - f rows",
        "aggregators/krum.py",
        "self.m or n - self.f - definition.kept]",
        "self.m or n - self.f]",
        "aggregators",
    ),
    Bug(
        "NNM leaves the row itself out",
        "aggregators/nearest_neighbor_mixing.py",
        "[:, : n - self.f]",
        "[:, 1 : 1 + n - self.f]",
        "aggregators",
    ),
    Bug(
        "a nan row is not removed",
        "aggregators/base.py",
        "rows.finite() if present is None",
        "torch.ones(len(rows)).bool() if present is None",
        "aggregators",
    ),
    Bug(
        "f not reduced for silent rows",
        "aggregators/base.py",
        "f = min(remaining, most)",
        "f = remaining",
        "aggregators",
    ),
    Bug(
        "f reduced for every silent row",
        "aggregators/base.py",
        "f = min(remaining, most)",
        "f = max(0, remaining - quiet)",
        "aggregators",
    ),
    Bug("n = 2f accepted", "aggregators/base.py", "return (n - 1) // 2", "return n // 2", "aggregators"),
    Bug(
        "NNM and a mean claim to be robust",
        "aggregators/chain.py",
        "isinstance(self.rule, Mean) and any(part.bounds_rows for part in self.pre)",
        "isinstance(self.rule, Mean) and len(self.pre) > 0",
        "aggregators",
    ),
    Bug(
        "who is exposed still counts as a liar",
        "aggregators/base.py",
        "self.f - exposed, silent - exposed",
        "self.f, silent",
        "aggregators",
    ),
    Bug(
        "absent workers count as exposed",
        "engine/server_side.py",
        "exposed=spoke & ~present & ~left_out,",
        "exposed=~present & ~left_out,",
        "exchange",
    ),
    Bug(
        "an overflown message is sent",
        "engine/worker_side.py",
        "if bool(codec.valid(payload, len(x))):",
        "if True:",
        "exchange",
    ),
    Bug(
        "Bulyan breaks ties by order",
        "aggregators/krum.py",
        "key=lambda i: sums[i].tolist())",
        "key=lambda i: float(sums[i][0]))",
        "rules",
    ),
    Bug(
        "Bulyan averages n - 2f values",
        "aggregators/krum.py",
        "middle_of(ordered), n - 4 * f)",
        "middle_of(ordered), n - 2 * f)",
        "aggregators",
    ),
    Bug("Bulyan with n > 2f", "aggregators/krum.py", "return (n - 3) // 4", "return (n - 1) // 2", "rules"),
    Bug(
        "MDA takes the next larger diameter",
        "aggregators/subset_search.py",
        "levels[low]) if levels",
        "levels[min(low + 1, len(levels) - 1)]) if levels",
        "rules",
    ),
    Bug(
        "MDA's cover may be larger than f",
        "aggregators/subset_search.py",
        "_covers(_farther(distances, levels[middle]), f)",
        "_covers(_farther(distances, levels[middle]), f + 1)",
        "aggregators",
    ),
    Bug(
        "SMEA does not centre",
        "aggregators/subset_search.py",
        "torch.linalg.eigvalsh(centred)",
        "torch.linalg.eigvalsh(among)",
        "aggregators",
    ),
    Bug("CAF keeps the last mean", "aggregators/spectral.py", "if variance < best:", "if True:", "rules"),
    Bug(
        "CAF does not weigh the covariance",
        "aggregators/spectral.py",
        "root[:, None] * centred * root",
        "centred / len(weights)",
        "aggregators",
    ),
    Bug("DnC drops the nearest", "aggregators/spectral.py", "[n - drop :]", "[:drop]", "aggregators"),
    Bug("DnC takes the union", "aggregators/spectral.py", "(bad == bad.min())", "(bad < self.iterations)", "rules"),
    Bug(
        "SignGuard does not clip",
        "aggregators/sign_guard.py",
        "torch.where(passed, factors, 0.0)",
        "passed.double()",
        "aggregators",
    ),
    Bug(
        "SignGuard's block is of the slice",
        "aggregators/sign_guard.py",
        "rows.span(first, first + size)",
        "rows.span(rows.offset + first, rows.offset + first + size)",
        "rules",
    ),
    Bug(
        "a point belongs to the first peak",
        "aggregators/sign_guard.py",
        'labels = torch.cdist(points, peaks[kept], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)',
        "labels = torch.zeros(n, dtype=torch.int64)",
        "rules",
    ),
    Bug(
        "AutoGM sorts by index",
        "aggregators/geometric_median.py",
        "ordered = distances.sort().values",
        "ordered = distances",
        "aggregators",
    ),
    Bug(
        "CenteredClip forgets its last result",
        "aggregators/centered_clipping.py",
        "else rows.last",
        "else None",
        "rules",
    ),
    Bug(
        "CenteredClip divides by the rows it clips",
        "aggregators/centered_clipping.py",
        "1.0) / n",
        "1.0) / (distances > self.tau).sum().clamp_min(1)",
        "aggregators",
    ),
    Bug(
        "MoNNA trusts a place, not a worker",
        "aggregators/subsets.py",
        "(rows.index == self.trusted)",
        "(torch.arange(len(rows)) == self.trusted)",
        "rules",
    ),
    Bug(
        "a tie is a minus",
        "aggregators/majority_vote.py",
        "torch.where(vote == 0, 1, vote)",
        "torch.where(vote == 0, -1, vote)",
        "aggregators rules",
    ),
    Bug(
        "shares do not go with their rows",
        "numerics/rows.py",
        "self.shares[keep.to(self.shares.device)]",
        "self.shares[: len(keep)]",
        "rules",
    ),
    Bug("f rows may hold half of the data", "aggregators/base.py", "(2 * shares.sort(", "(shares.sort(", "rules"),
    Bug(
        "a stale Gram matrix",
        "numerics/rows.py",
        "if values is self.values and index is self.index and",
        "if values is not None and",
        "aggregators algorithms",
    ),
    Bug(
        "the estimate is the rule's memory",
        "algorithms/traits.py",
        "return result, result.clone()",
        "return result, result",
        "algorithms",
    ),
    # algorithms of the four papers
    Bug(
        "DM21's second momentum is of the gradient",
        "algorithms/byz_dm21.py",
        "torch.lerp(state.u, v, self.eta)",
        "torch.lerp(state.u, grads.current, self.eta)",
        "papers",
    ),
    Bug("STORM with the old v only", "algorithms/byz_dm21.py", "(state.v - grads.previous)", "state.v", "papers"),
    Bug("MARINA-PP does not clip", "algorithms/byz_vr_marina_pp.py", "norms > lam, lam /", "norms > torch.inf, lam /", "papers"),
    Bug("MARINA-PP clips to the norm of g", "algorithms/byz_vr_marina_pp.py", '== "drift" else', '!= "drift" else', "papers"),
    Bug(
        "difference rounds with the f of full rounds",
        "algorithms/byz_vr_marina_pp.py",
        "rule.with_f(min(self.aggregator.f or 0, rule.most_f(size)))",
        "rule.with_f(self.aggregator.f or 0)",
        "papers",
    ),
    Bug(
        "differences are not added to g",
        "algorithms/byz_vr_marina_pp.py",
        "g = state.g + rule(",
        "g = rule(",
        "papers",
    ),
    Bug(
        "full rounds are compressed",
        "algorithms/byz_vr_marina_pp.py",
        "Identity() if self.is_full(round) else self.compressor",
        "self.compressor",
        "papers",
    ),
    Bug(
        "MARINA-PP's full rounds draw the small cohort",
        "algorithms/byz_vr_marina_pp.py",
        "self.full_size(round.n) if self.is_full(round) else",
        "",
        "papers",
    ),
    Bug("monitors see unclipped rows", "algorithms/byz_vr_marina_pp.py", "state.base + steps.dense()", "steps.dense()", "papers"),
    Bug(
        "dSTAR waits for the last k",
        "algorithms/dstar.py",
        "self.arrivals(round).sort(stable=True)",
        "(-self.arrivals(round)).sort(stable=True)",
        "papers",
    ),
    Bug("liars are as slow as the others", "algorithms/dstar.py", "seconds.masked_fill(round.rushing, 0.0)", "seconds", "papers"),
    Bug("the filter keeps the far rows", "algorithms/dstar.py", "deviations <= self", "deviations >= self", "papers"),
    Bug("the filter's median is the upper one", "algorithms/dstar.py", "(len(rows) - 1) // 2]", "len(rows) // 2]", "papers"),
    Bug("a trusted gradient narrows the tolerance", "algorithms/dstar.py", "torch.maximum(limit", "torch.minimum(limit", "papers"),
    Bug("k = 2f accepted", "algorithms/dstar.py", "if k <= 2 * f:", "if k < 2 * f:", "papers"),
    Bug(
        "SIGNUM weighs the new gradient by beta",
        "algorithms/signsgd_majority_vote.py",
        "torch.lerp(v, state.v,",
        "torch.lerp(state.v, v,",
        "papers",
    ),
    Bug(
        "SIGNUM sends the gradient's sign",
        "algorithms/signsgd_majority_vote.py",
        "encode(v), state",
        "encode(grads.current), state",
        "papers",
    ),
    Bug("the downlink is not encoded", "algorithms/signsgd_majority_vote.py", "    def downlink(", "    def _downlink(", "papers"),
    Bug(
        "late messages enter",
        "engine/server_side.py",
        "(flags[:, 0] == SPEAKS) & round.cohort",
        "(flags[:, 0] == SPEAKS)",
        "papers",
    ),
    Bug(
        "who is not sampled is called silent",
        "engine/outcome.py",
        "(self.round.cohort & ~self.round.present)",
        "(~self.round.present)",
        "papers",
    ),
    Bug(
        "the drift of a skipped step is lost",
        "engine/exchange.py",
        "if outcome.estimate is not None and self.algorithm.needs_drift:",
        "if self.algorithm.needs_drift:",
        "papers",
    ),
    Bug("the previous parameters are not saved", "engine/exchange.py", '"previous": self.previous}', '"previous": None}', "exchange"),
    # gradients besides the minibatch's
    Bug(
        "the previous pass has other dropout masks",
        "strategies/extra_gradients.py",
        "random_states.worker_rng(self.device, *key)",
        "random_states.worker_rng(self.device, *key, 1)",
        "quiet_passes",
    ),
    Bug(
        "the previous pass updates BatchNorm",
        "strategies/extra_gradients.py",
        "with self.buffers.scratch(worker), ",
        "with self.buffers.of(worker), ",
        "quiet_passes",
    ),
    Bug("the previous pass logs", "strategies/extra_gradients.py", 'vars(self.module)["log"] = WorkerLog().record', "pass", "quiet_passes"),
    Bug("the previous pass counts in metrics", "strategies/extra_gradients.py", "_metrics_kept(self.module), ", "", "quiet_passes"),
    Bug(
        "the previous pass moves numpy's random state",
        "strategies/extra_gradients.py",
        "with random_states_kept(strategy.root_device), before:",
        "with before:",
        "quiet_passes",
    ),
    Bug(
        "the parameters stay at the previous ones",
        "strategies/extra_gradients.py",
        "                p.copy_(value)\n",
        "                pass\n",
        "quiet_passes",
    ),
    Bug(
        "gradients keep the loss scale",
        "strategies/extra_gradients.py",
        "layout.read_gradients(1 / scale)",
        "layout.read_gradients()",
        "quiet_passes",
    ),
    Bug(
        "a full pass restores no random state",
        "strategies/extra_gradients.py",
        "    with random_states_kept(device):\n        _seed",
        "    if True:\n        _seed",
        "quiet_passes",
    ),
    Bug(
        "full gradients weigh batches alike",
        "strategies/extra_gradients.py",
        "totals[i].add(done, splitter.size(batch))",
        "totals[i].add(done, 1)",
        "quiet_passes",
    ),
    Bug(
        "a full pass reads other workers' data",
        "strategies/extra_gradients.py",
        "sampler.parts[worker], keyed",
        "sampler.parts[0], keyed",
        "quiet_passes",
    ),
    Bug(
        "workers that are not sampled work",
        "strategies/workers.py",
        "None if part is None or not cohort[w] else",
        "None if part is None else",
        "quiet_passes",
    ),
    Bug(
        "rank 0's trusted gradient is not shared", "engine/exchange.py", "trusted = self.transport.agree(trusted)", "pass", "quiet_passes"
    ),
    # compressors
    Bug(
        "Rand-K without d / K",
        "compressors/sparse.py",
        "        return dim / self.count(dim)\n",
        "        return 1.0\n",
        "compressors",
    ),
    Bug(
        "Rand-K prefers small indices",
        "compressors/sparse.py",
        "picked = picked[first.sort().values]",
        "picked = values",
        "compressors",
    ),
    Bug(
        "Top-K without magnitudes",
        "compressors/sparse.py",
        "numbers(slice(None)).abs().topk(",
        "numbers(slice(None)).topk(",
        "compressors",
    ),
    Bug(
        "Top-K of a sample without magnitudes",
        "compressors/sparse.py",
        "torch.abs(x[here], out=block)",
        "block.copy_(x[here])",
        "compressors",
    ),
    Bug("Top-K trusts its sample", "compressors/sparse.py", "if len(candidates) >= count:", "if len(candidates):", "compressors"),
    Bug(
        "Top-K overlooks nan",
        "compressors/sparse.py",
        "~(magnitudes < threshold.numpy())",
        "magnitudes >= threshold.numpy()",
        "compressors",
    ),
    Bug("Top-K forgets which block", "compressors/sparse.py", ".add_(first)", "", "compressors"),
    Bug("the norm of many numbers in float32", "compressors/quantization.py", "x, dtype=torch.float64)", "x)", "compressors"),
    Bug(
        "bits packed from the top", "compressors/bits.py", "(top - (8 - width) * i)", "((8 - width) * i + width - 1)", "compressors"
    ),
    Bug("low rank without a basis", "compressors/low_rank.py", "torch.linalg.qr(m @ q).Q", "m @ q", "compressors"),
    Bug("low rank ignores its iterations", "compressors/low_rank.py", "range(self.iterations)", "range(1)", "compressors"),
    Bug("low rank trusts P", "compressors/low_rank.py", "(p.abs() <= 1).all() & ", "", "compressors"),
    Bug("low rank of P transposed", "compressors/low_rank.py", "(p @ q.T).view", "(q @ p.T).reshape", "compressors"),
    Bug("a block's contraction for all", "compressors/blocks.py", "else min(self", "else max(self", "compressors"),
    Bug("a block's variance for all", "compressors/blocks.py", "else max(self", "else min(self", "compressors"),
    Bug("the first tensor's payload for all", "compressors/blocks.py", "            first = last\n", "", "compressors"),
    Bug("sizes of tensors not passed on", "strategies/gradient_sync.py", "self._algorithm.for_sizes(self.layout.sizes)", "self._algorithm", "workers"),
    Bug("EF14 forgets what it dropped", "algorithms/ef14.py", "u = grads.current + state.e", "u = grads.current", "algorithms"),
    Bug(
        "EF14 keeps what it sent",
        "algorithms/ef14.py",
        "u - self.compressor.decode(c, len(u))",
        "self.compressor.decode(c, len(u))",
        "algorithms",
    ),
    Bug("repeated indices are valid", "compressors/sparse.py", "index[1:] > index[:-1]", "index[1:] >= index[:-1]", "compressors"),
    Bug(
        "negative indices are valid",
        "compressors/sparse.py",
        "(index[0] >= 0) & (index[-1] < dim)",
        "index[-1] < dim",
        "compressors",
    ),
    Bug("nan values are valid", "compressors/sparse.py", "all_finite(values) & inside", "inside", "compressors"),
    Bug(
        "minus inf passes for finite",
        "numerics/finite.py",
        "torch.isfinite(low) & torch.isfinite(high)",
        "torch.isfinite(high)",
        "compressors",
    ),
    # attacks
    Bug(
        "ALIE with the other sign", "attacks/messages.py", "honest.mean(0) - self.factor", "honest.mean(0) + self.factor", "attacks"
    ),
    Bug("CAF's floor ends on one row", "aggregators/spectral.py", "if taken:", "if False:", "rules"),
    Bug("ALIE divides by h, not h - 1", "attacks/base.py", "squares.div_(len(rows) - 1)", "squares.div_(len(rows))", "attacks"),
    Bug("ALIE with one supporter less", "attacks/messages.py", "n // 2 + 1 - f", "n // 2 - f", "attacks"),
    Bug("IPM forgets its sign", "attacks/messages.py", "everyone(-self.epsilon", "everyone(self.epsilon", "attacks"),
    Bug("AntiCGE one norm too long", "attacks/messages.py", "norms[min(kept, h - 1)]", "norms[min(kept + 1, h - 1)]", "attacks"),
    Bug(
        "AntiCGE counts the smallest twice",
        "attacks/messages.py",
        "-honest[order[:kept]].mean(0)",
        "-honest[order[:kept]].sum(0) - honest[order[0]]",
        "attacks",
    ),
    Bug("the line search never turns back", "attacks/optimized.py", "if proposal < best:", "if proposal < 0:", "attacks"),
    Bug("the line search goes below 0", "attacks/optimized.py", "while back < 0:", "while False:", "attacks"),
    Bug("steps do not double", "attacks/optimized.py", "proposal, value, 2 * step", "proposal, value, step", "attacks"),
    Bug(
        "optimized against the honest mean whatever the server",
        "attacks/optimized.py",
        "if scene.target is None else scene.target()",
        "",
        "attacks",
    ),
    Bug("Mimic follows a row", "attacks/remembering.py", "torch.tensor(workers[row])", "torch.tensor(row)", "attacks"),
    Bug("Mimic projects on the mean's other side", "attacks/remembering.py", ".argmax()", ".argmin()", "attacks"),
    Bug(
        "Mimic's target is never kept",
        "attacks/remembering.py",
        "rounds=torch.tensor(rounds + 1)",
        "rounds=torch.tensor(rounds)",
        "attacks",
    ),
    Bug("ShiftBack acts on a tie", "attacks/remembering.py", "if len(own) > len(honest)", "if len(own) >= len(honest)", "attacks"),
    Bug("ShiftBack pushes onwards", "attacks/remembering.py", "(x - start)", "(start - x)", "attacks"),
    Bug("parts of a mixture share memory", "attacks/mixture.py", 'prefix = f"{part}/"', 'prefix = "0/"', "attacks"),
    Bug(
        "a part does not know the lies before it",
        "attacks/mixture.py",
        "_of_part(scene.aggregate, lies, rows)",
        "_of_part(scene.aggregate, own, rows)",
        "attacks",
    ),
    Bug(
        "a mixture splits those who are there",
        "attacks/mixture.py",
        "list(workers if scene.byzantine is None else scene.byzantine)",
        "workers",
        "attacks",
    ),
    Bug("a flipped bit stays in one coordinate", "attacks/faults.py", "torch.randint(d, (b,)", "torch.randint(1, (b,)", "attacks"),
    Bug("all stuck workers repeat one message", "attacks/faults.py", "setdefault(str(worker),", 'setdefault("0",', "attacks"),
    Bug(
        "shuffled labels may stay",
        "attacks/faults.py",
        "labels[cycle.roll(1)]",
        "labels[torch.randperm(len(labels), generator=generator)]",
        "attacks",
    ),
    Bug("colluders share memory", "attacks/base.py", "message.expand_as(own).clone()", "message.expand_as(own)", "attacks"),
    # algorithms
    Bug(
        "EF21 server without its mirror",
        "algorithms/byz_ef21_sgdm.py",
        "torch.add(state.g, rows.dense(), out=round.room(state.g))",
        "rows.dense().clone()",
        "algorithms",
    ),
    Bug(
        "EF21 aggregates the differences",
        "algorithms/byz_ef21_sgdm.py",
        "self.aggregate(mirrors, state.last",
        "self.aggregate(rows, state.last",
        "algorithms",
    ),
    Bug("EF21 worker compresses v", "algorithms/byz_ef21_sgdm.py", "encode_difference(v, state.g,", "encode(v,", "algorithms"),
    Bug(
        "eta weighs the past",
        "algorithms/byz_ef21_sgdm.py",
        "lerp(state.v, grads.current,",
        "lerp(grads.current, state.v,",
        "algorithms",
    ),
    Bug(
        "the server keeps what it has sent",
        "algorithms/byz_ef21_sgdm_bc.py",
        "state._replace(h=h)",
        "state._replace(h=a)",
        "algorithms",
    ),
    Bug("the K-th largest change stays behind", "algorithms/byz_ef21_sgdm_bc.py", "change >= rows", "change > rows", "algorithms"),
    Bug(
        "K of every share instead of the whole",
        "algorithms/byz_ef21_sgdm_bc.py",
        "rows.kth_largest(change, count)",
        "Rows(rows.values).kth_largest(change, count)",
        "sharded",
    ),
    Bug("a misleading sample is believed", "numerics/rows.py", "if int(self._count(likely)) >= left else bits", "", "rows"),
    Bug(
        "the largest number's rank is counted in this slice",
        "numerics/rows.py",
        "return self.sum(weight * torch.bincount",
        "return (weight * torch.bincount",
        "rows",
    ),
    Bug("an overflowing mirror is kept", "algorithms/byz_ef21_sgdm.py", "if not finite.all():", "if False:", "algorithms"),
    Bug(
        "momentum not corrected for its start",
        "algorithms/robust_sgd.py",
        "m if correction == 1 else m / correction",
        "m.clone()",
        "algorithms",
    ),
    Bug(
        "the estimate is the momentum's memory", "algorithms/robust_sgd.py", "g = g.clone() if g is m else g", "g = g", "algorithms"
    ),
    # the round
    Bug(
        "state committed although its message did not count",
        "engine/worker_side.py",
        "if present[worker]:",
        "if True:",
        "exchange",
    ),
    Bug(
        "messages are not checked",
        "engine/server_side.py",
        "~left_out & received.valid.cpu()",
        "~left_out",
        "exchange",
    ),
    Bug(
        "f gradients make a parameter used",
        "engine/server_side.py",
        ".sum(0) > min(",
        ".sum(0) >= min(",
        "exchange",
    ),
    Bug(
        "a resumed run starts at round 0",
        "engine/exchange.py",
        'self.step, self._announced = server["step"], -1',
        "self.step, self._announced = 0, -1",
        "exchange",
    ),
    Bug(
        "the attack sees its own side as honest",
        "engine/adversary.py",
        "[worker for worker in rows if worker not in self.byzantine]",
        "list(rows)",
        "exchange",
    ),
    Bug("absent liars stay silent", "engine/adversary.py", "flags[0] = SPEAKS", "pass", "exchange"),
    Bug(
        "other liars are seen as honest",
        "engine/adversary.py",
        "cohort[worker] and worker not in others",
        "cohort[worker]",
        "exchange",
    ),
    Bug("liars outside the cohort speak", "engine/adversary.py", "(forged and cohort[worker])", "forged", "exchange"),
    Bug(
        "faulty workers speak although silent",
        "engine/adversary.py",
        "(forged and cohort[worker])",
        "cohort[worker]",
        "exchange",
    ),
    Bug(
        "a candidate skips the codec",
        "engine/adversary.py",
        "values[worker] = self._columns(payload) if",
        "values[worker] = lie if",
        "exchange",
    ),
    Bug(
        "every candidate is compressed by other chance",
        "engine/adversary.py",
        'private("compressor", lie.device)',
        'private(f"compressor{float(lie.sum())}", lie.device)',
        "exchange",
    ),
    Bug("a new run remembers the last one's lies", "engine/adversary.py", "if round.step == 0 or dim", "if dim", "exchange"),
    Bug(
        "an attack's memory is not loaded",
        "engine/adversary.py",
        'state["dim"], dict(state["memory"])',
        'state["dim"], {}',
        "exchange",
    ),
    Bug(
        "they lie in every step", "callbacks/byzantine_workers.py", " or (step - self.start) % self.every", "", "byzantine_workers"
    ),
    Bug(
        "they lie every so many steps of the run",
        "callbacks/byzantine_workers.py",
        "(step - self.start) % self.every",
        "step % self.every",
        "byzantine_workers",
    ),
    Bug(
        "a coin for the whole run",
        "callbacks/byzantine_workers.py",
        "*self._coin_key, step)",
        "*self._coin_key)",
        "byzantine_workers",
    ),
    Bug(
        "two lies a step",
        "callbacks/byzantine_workers.py",
        "            self._check_others(trainer, indices)\n",
        "",
        "byzantine_workers",
    ),
    Bug(
        "callbacks do not know of each other",
        "engine/simulation.py",
        "liars = self.liars_at(round.step)",
        "liars = set()",
        "byzantine_workers",
    ),
    Bug(
        "labels are shuffled alike in all steps",
        "callbacks/byzantine_workers.py",
        "exchanges[0].seed, step, worker",
        "exchanges[0].seed, worker",
        "byzantine_workers",
    ),
    Bug(
        "all optimizers' attacks see the first one's parameters",
        "callbacks/byzantine_workers.py",
        "strategy.groups[i].parameters_now()",
        "strategy.groups[0].parameters_now()",
        "byzantine_workers",
    ),
    Bug(
        "a checkpoint of other shapes is loaded",
        "engine/state_layout.py",
        "if shapes != found:",
        "if False:",
        "exchange",
    ),
    Bug("all workers draw the same coordinates", "types.py", "self.step, 1 + self.worker,", "self.step, 1,", "exchange"),
    Bug("tensors are not aligned on the wire", "transports/wire.py", "_ALIGNMENT = 8", "_ALIGNMENT = 1", "exchange"),
    # data
    Bug(
        "the partition forgets its seed",
        "data/partitions.py",
        'keyed_seed("partition", seed)',
        'keyed_seed("partition")',
        "partitions",
    ),
    Bug(
        "every rank its own partition",
        "data/sampler.py",
        "partition(labels, n, seed)",
        "partition(labels, n, seed + rank)",
        "partitions",
    ),
    Bug(
        "Dirichlet draws once for all classes",
        "data/partitions.py",
        "rng.dirichlet(np",
        "np.random.default_rng(n).dirichlet(np",
        "partitions",
    ),
    Bug(
        "Dirichlet with the wrong concentration",
        "data/partitions.py",
        "np.full(n, self.alpha)",
        "np.full(n, self.alpha / n)",
        "partitions",
    ),
    Bug("Dirichlet lets a worker starve", "data/partitions.py", "if least >= self.min_samples:", "if True:", "partitions"),
    Bug("gamma the other way round", "data/partitions.py", "round(self.gamma * len", "round((1 - self.gamma) * len", "partitions"),
    Bug("runs that are not sorted", "data/partitions.py", 'order[np.argsort(labels[order], kind="stable")]', "order", "partitions"),
    Bug("Subset's labels are the whole set's", "data/partitions.py", "[torch.as_tensor(dataset.indices)]", "", "partitions"),
    Bug("no checksum", "data/base.py", "if digest.hexdigest() != sha256:", "if False:", "data_sets"),
    Bug("half a file stays", "data/base.py", "os.unlink(part.name)", "pass", "data_sets"),
    Bug("rows are not normalized", "data/libsvm.py", "if self.normalize else x", "if False else x", "data_sets"),
    Bug("columns that are empty get lost", "data/libsvm.py", "None if known is None else known.features", "None", "data_sets"),
    Bug(
        "pickles may call anything",
        "data/images.py",
        "if harmless is not None:",
        "if harmless or (harmless := __builtins__.get(name)):",
        "data_sets",
    ),
    Bug("every epoch augments alike", "data/images.py", "0 if self.sampler is None else self.sampler.epoch,", "0,", "data_sets"),
    Bug(
        "held-out images are augmented",
        "data/images.py",
        "self.mean, self.std)\n\n    def train",
        "self.mean, self.std, self.augment)\n\n    def train",
        "data_sets",
    ),
    Bug("images are never mirrored", "data/images.py", "torch.where(way % 2 == 0, ", "torch.where(way >= 0, ", "data_sets"),
    Bug("one-hot labels flip like indices", "attacks/data.py", "if dimension is not None:", "if False:", "attacks"),
    Bug("labels beyond the classes flip", "attacks/data.py", "~kept & ~(labels <= most)", "labels.isnan()", "attacks"),
    Bug("several classes at a time flip", "attacks/data.py", "if most > 1 and labels.ndim > 1 and", "if False and", "attacks"),
    Bug("an ignored label flips", "attacks/data.py", "kept |= labels < 0", "kept = labels < 0", "attacks"),
    Bug("a record is cut like samples", "data/batches.py", ' and not hasattr(item, "_fields")', "", "exchange"),
    Bug("lists of samples are fields", "data/batches.py", "as_samples = _is_list(item)", "as_samples = False and _is_list(item)", "exchange"),
    Bug("what lists hold is forgotten", "data/batches.py", "self._remember(batch, (), reading)", "pass", "exchange"),
    Bug("the loader's batch size is not looked at", "data/batches.py", "read.size == self._size)", "False)", "exchange"),
    Bug("objects that hide tensors go to everybody", "data/batches.py", "if _hides_tensors(item):\n            return False", "if False:\n            return False", "exchange"),
    Bug("loaders' batches are cut as one", "data/batches.py", "bool(self._inner) and", "False and", "exchange"),
    Bug(
        "who has passed is waited for",
        "strategies/checkpoint_barrier.py",
        "passed = [rank for rank, number in numbers.items() if number > self._number]",
        "passed: list[int] = []",
        "store_barrier",
    ),
    Bug("who is late is not waited for", "strategies/checkpoint_barrier.py", "if self.rank == 0 and self._number in numbers.values() else self.timeout", "", "store_barrier"),
    Bug("a roll call of the first process group", "strategies/checkpoint_barrier.py", "_made[0] is not group", "False", "store_barrier"),
    Bug("restore leaves numpy's stream alone", "strategies/random_states.py", 'np.random.set_state(("MT19937"', 'print(("MT19937"', "exchange"),
    Bug("the last samples get lost", "data/batches.py", "(i * size) // self.parts", "i * (size // self.parts)", "exchange"),
    Bug("Byzantine workers' logs count", "strategies/step_logs.py", "if row is not None and counts]", "if row is not None]", "exchange"),
    Bug("workers in quarantine are logged", "strategies/step_logs.py", "if heard is None or worker in silenced", "if heard is None", "exchange strategy"),
    Bug("all values have one batch size", "strategies/step_logs.py", "log.sizes.get(name, log.samples)", "log.samples", "exchange strategy"),
    Bug("logged values lose their precision", "strategies/step_logs.py", "if name in self._float64 else torch.float32", "if False else torch.float32", "exchange"),
    Bug("reductions by their exact name only", "strategies/reductions.py", ".lower().removeprefix", ".removeprefix", "exchange"),
    Bug(
        "weights of ranks without a value",
        "strategies/reductions.py",
        "torch.where(weighed[0], values, 0)",
        "values",
        "strategy",
    ),
    Bug("whoever came first says how a name is logged", "strategies/step_logs.py", "counts.most_common(1)[0][0]", "next(iter(counts))", "exchange"),
    # what other processes say
    Bug("a negative number of samples", "transports/parsing.py", "not (0 <= value <= _MOST", "not (value <= _MOST", "parsing exchange"),
    Bug("any name is logged", "transports/parsing.py", "or not name.isprintable()", "", "parsing"),
    Bug("values logged on nothing", "transports/parsing.py", 'if arguments.get("on_step") is False and', "if False and", "parsing exchange"),
    Bug("other sizes than the first", "transports/parsing.py", "or shape[1:] != tuple(like.shape[1:])", "or False", "parsing"),
    Bug("tensors without elements of any length", "transports/parsing.py", "if shape != tuple(like.shape) and not row:", "if False:", "parsing"),
    Bug("truth values that are neither", "transports/parsing.py", "raw != 0 if like.dtype == torch.bool else ", "", "parsing"),
    Bug("room for any batch", "callbacks/duplicate_batch_check.py", "= _MUCH * max(", "= 1e30 * max(", "replicas"),
    Bug(
        "who has left is waited for",
        "transports/parameter_server/desk.py",
        "if member.left or member.dropped:",
        "if member.dropped:",
        "parameter_server_faults",
    ),
    Bug(
        "a snapshot whenever one asks",
        "transports/parameter_server/desk.py",
        "self.position >= member.given + self.backlog",
        "True",
        "parameter_server_faults",
    ),
    Bug(
        "who loses the door is dead",
        "transports/parameter_server/desk.py",
        "self._all_lost = now",
        "pass",
        "parameter_server_faults",
    ),
    Bug(
        "nobody is dropped",
        "transports/parameter_server/door.py",
        "if self._excess[rank] > QUOTA:",
        "if False:",
        "parameter_server_door",
    ),
    Bug(
        "who was dropped is let in",
        "transports/parameter_server/door.py",
        "in_ = rank is not None and rank not in self._dropped",
        "in_ = rank is not None",
        "parameter_server_door",
    ),
    Bug(
        "a door forgets whom the last one dropped",
        "transports/parameter_server/server.py",
        '"dropped": sorted(self._dropped)',
        '"dropped": []',
        "parameter_server_door",
    ),
    Bug(
        "strangers stay",
        "transports/parameter_server/door.py",
        "self._cut(oldest)",
        "pass",
        "parameter_server_door",
    ),
    Bug(
        "a door that ends stays closed",
        "transports/parameter_server/server.py",
        "            self._start_door()\n        try:",
        "            return\n        try:",
        "parameter_server_door",
    ),
    Bug(
        "the door outlives the training",
        "transports/parameter_server/door.py",
        "while os.getppid() == self._parent:",
        "while True:",
        "parameter_server_door",
    ),
    Bug(
        "a repeated frame is lost",
        "transports/parameter_server/door.py",
        "                frames.append(self._frame)\n",
        "                frames.append(memoryview(b''))\n",
        "parameter_server_door",
    ),
    # command line
    Bug("a grid forgets what it has done", "cli/grids.py", 'and result["status"] != "failed"\n', "and False\n", "grids"),
    Bug("a failed cell is not tried again", "cli/grids.py", 'and result["status"] != "failed"\n', "\n", "grids"),
    Bug("a dead process is used again", "cli/grids.py", "                    worker.restart()\n", "", "grids"),
    Bug("cells share a logger's folder", "cli/grids.py", 'output / "cells" / name, cell.label', 'output / "cells", cell.label', "grids"),
    Bug("the worst case is the best", "cli/reports.py", "values[i, -1] = values[i, :-1].min()", "values[i, -1] = values[i, :-1].max()", "grids"),
    Bug("the configuration is in the first logger only", "cli/runs.py", "in trainer.loggers:", "in trainer.loggers[:1]:", "cli"),
    # shards
    Bug(
        "a share's indices count from the beginning of the vector",
        "compressors/sparse.py",
        "index[start:end] - first)",
        "index[start:end])",
        "compressors",
    ),
    Bug(
        "a share shrinks by its own dimension",
        "compressors/quantization.py",
        "self.contraction(dim))",
        "self.contraction(last - first))",
        "compressors",
    ),
    Bug("a vote that is one short", "algorithms/signsgd_majority_vote.py", "heard // 2 + 1)", "heard // 2)", "exchange"),
    Bug(
        "votes carry no farther than one bit",
        "compressors/bits.py",
        "plane ^ carry, plane & carry",
        "plane ^ carry, plane & ~plane",
        "compressors",
    ),
    Bug("a nan in another share goes unnoticed", "transports/base.py", "self.total((~valid).double()) == 0", "valid", "sharded"),
    Bug("norms are of a share", "numerics/rows.py", "self.agree(self.sum(torch.linalg", "self.agree((torch.linalg", "sharded"),
    Bug(
        "rules do not add up over the ranks",
        "engine/server_side.py",
        "total=transport.total,",
        "",
        "sharded",
    ),
    Bug(
        "rules take a share for the whole",
        "engine/server_side.py",
        "dim=self.dim,\n",
        "dim=None,\n",
        "sharded",
    ),
    Bug(
        "shares of the state are not collected",
        "engine/server_side.py",
        "self.transport.collect(value, self.dim) if here else value",
        "value",
        "sharded",
    ),
    Bug(
        "the last estimate survives a checkpoint",
        "engine/exchange.py",
        "self.dim, self.previous, self._worker_side, self._server_side = None, None, None, None",
        'self.dim, self.previous = server["dim"], None',
        "exchange",
    ),
    Bug(
        "attackers on shards see their share of the trial only",
        "engine/server_side.py",
        "return self.transport.assemble(estimate, self.dim)",
        "return estimate",
        "sharded",
    ),
    # overlap
    Bug(
        "a broken gradient is sent as sound",
        "engine/worker_side.py",
        "if not (here and bool(torch.stack(self.sound[worker]).all())):",
        "if not here:",
        "sharded",
    ),
    Bug(
        "a checkpoint's state is written into later",
        "engine/exchange.py",
        "{name: t.clone() for name, t in state._asdict().items()}",
        "dict(state._asdict())",
        "sharded",
    ),
    Bug(
        "the first coordinates are waited for first",
        "transports/sharded.py",
        "for start in reversed(starts)]",
        "for start in starts]",
        "sharded overlap",
    ),
    Bug("parameters without a gradient keep the last one", "strategies/overlap.py", "if i not in self._written:", "if False:", "overlap"),
    Bug("a gradient that comes late is not noticed", "strategies/overlap.py", "self._late = True", "pass", "overlap"),
    Bug("a backward of one's own is overlooked", "strategies/overlap.py", "if not _is_lightnings(module.backward):", "if False:", "overlap"),
    # the seam
    Bug("groups never wait for their optimizer", "strategies/gradient_sync.py", "if not (several and", "if not (False and", "gradient_sync"),
    Bug("groups wait although nothing remembers", "strategies/gradient_sync.py", " and not g.exchange.algorithm.stateless)", ")", "gradient_sync"),
    Bug("aggregates are not set aside", "strategies/gradient_sync.py", "self._aside[id(p)], p.grad = p.grad, None", "pass", "gradient_sync"),
    Bug("aggregates are not put back", "strategies/gradient_sync.py", "before.add_(p.grad)", "before.copy_(p.grad)", "gradient_sync"),
    Bug("blocked backward passes onto an aggregate", "strategies/gradient_sync.py", "if self.blocked and group.holds_aggregate():", "if False:", "gradient_sync"),
    Bug("micro-batches are exchanged", "strategies/gradient_sync.py", "at_once = [] if self.blocked else", "at_once =", "gradient_sync"),
    Bug("backward by hand is not seen", "strategies/gradient_sync.py", "each.pending |= each.layout is not None", "each.pending |= False", "gradient_sync"),
    Bug("gradients set by hand are not seen", "strategies/gradient_sync.py", "if self._fresh or self.pending:", "if True:", "gradient_sync"),
    Bug("drifting parameters are not seen", "strategies/gradient_sync.py", "if not self.pending:\n            return", "return", "gradient_sync"),
    Bug("edits before the exchange are not seen", "strategies/gradient_sync.py", "for p in self._members() if self._versions else ():", "for p in ():", "gradient_sync"),
    Bug(
        "a repeated round adds to the memory",
        "engine/exchange.py",
        "            self._worker_side.remember(workers)\n",
        "",
        "gradient_sync",
    ),
    Bug("hooks of ours run before the user's", "strategies/gradient_sync.py", "node.register_hook(partial(self._arrived, p))", "p.register_post_accumulate_grad_hook(partial(self._arrived, p))", "gradient_sync"),
    Bug(
        "ranks draw on",
        "strategies/processes.py",
        "        random_states.reset()\n",
        "",
        "gradient_sync",
    ),
    Bug("ranks may be anywhere", "transports/meeting.py", "if all(torch.equal(said, mine) for said in heard.values()):", "if True:", "gradient_sync"),
    Bug(
        "a batch that is None hangs the others",
        "strategies/strategy.py",
        "return NoBatch() if module.trainer.training else batch",
        "return batch",
        "gradient_sync",
    ),
    Bug(
        "the world is what the Trainer says",
        "strategies/processes.py",
        "self._size = environment.world_size()",
        "self._size = None",
        "worker_state",
    ),
    Bug("attributes are shared", "strategies/module_attributes.py", "own.update({key: value", "{}.update({key: value", "worker_state"),
    Bug("data in buffers are aggregated", "strategies/module_buffers.py", "self._is_data.append(not norm and", "self._is_data.append(False and", "worker_state"),
    Bug("what changes between steps travels", "strategies/module_buffers.py", "if before() is not buffer or buffer._version != version:", "if False:", "worker_state"),
    Bug(
        "gradients are gathered past the rule",
        "strategies/validate.py",
        "if sync_grads and strategy.n > 1:",
        "if False:",
        "worker_state",
    ),
    Bug(
        "a state that keeps the gradient",
        "engine/worker_side.py",
        "check_kept(state, grads.current, owner)",
        "pass",
        "exchange",
    ),
    Bug("states have one row", "engine/state_layout.py", "t[..., first:last] if here", "t[first:last] if here", "sharded"),
    Bug(
        "steps without a loss count as diverged",
        "engine/server_side.py",
        "reason=NO_LOSS if nobody else str(error)",
        "reason=str(error)",
        "strategy",
    ),
    Bug(
        "a slice's window is cut at the wrong place",
        "numerics/rows.py",
        "place + min(last, end) - begin",
        "min(last, end) - begin",
        "sharded",
    ),
    Bug(
        "the server's state is that of the last piece",
        "engine/server_side.py",
        "torch.cat([state[i] for state in states], -1) if here else states[-1][i]",
        "states[-1][i]",
        "sharded",
    ),
    Bug(
        "every worker's message begins with the last one's momentum",
        "engine/worker_side.py",
        "(piece_of(state[worker], first, last, self.dim, whole) for",
        "(piece_of(state[worker], 0, last - first, self.dim, whole) for",
        "sharded",
    ),
    Bug("products of an earlier batch count again", "numerics/rows.py", "room[filled:threads] = 0", "pass", "rows"),
    Bug("memory of a tensor that the next state keeps", "numerics/memory.py", " and id(tensor) not in kept", "", "exchange"),
    Bug("memory that was never lent", "numerics/memory.py", "lent is not None and lent() is tensor and ", "", "exchange"),
    Bug(
        "numbers of other coordinates",
        "engine/server_side.py",
        "values[worker, place] =",
        "values[worker, : len(numbers)] =",
        "exchange",
    ),
    Bug("the last estimate stays", "transports/base.py", "last[index] = numbers", "pass", "exchange"),
    Bug(
        "mirrors stay where they were",
        "engine/server_side.py",
        "t.index_copy_(-1, index, new)",
        "t",
        "exchange",
    ),
    Bug(
        "a vote for nan",
        "engine/worker_side.py",
        "if not self.codec.tells_nonfinite:",
        "if False:",
        "sharded",
    ),
    Bug(
        "the largest of x, not of the difference",
        "compressors/sparse.py",
        "torch.sub(x[here], minus[here], out=block).abs_()",
        "torch.abs(x[here], out=block)",
        "compressors",
    ),
    Bug("entries of blocks without their places", "compressors/blocks.py", "[index + start for", "[index for", "testing"),
    Bug("entries that are not shrunk", "compressors/quantization.py", "values * self.contraction(dim)", "values", "testing"),
    Bug(
        "what arrives is not looked at",
        "transports/sharded.py",
        "valid[worker] &= self.codec.valid(piece, width)",
        "pass",
        "sharded",
    ),
    # stragglers, and the parameter server
    Bug(
        "first k by the algorithm's own clock",
        "algorithms/dstar.py",
        "self.delays(round) if round.arrivals is None else round.arrivals",
        "self.delays(round)",
        "stragglers",
    ),
    Bug(
        "the dead speak",
        "engine/worker_side.py",
        "taken = bool(round.cohort[worker]) and comes(round, worker)",
        "taken = bool(round.cohort[worker])",
        "stragglers",
    ),
    Bug(
        "a key speaks for any rank",
        "transports/parameter_server/desk.py",
        "head.rank != owner:",
        "False:",
        "parameter_server_faults",
    ),
    Bug(
        "messages of another dtype are taken",
        "transports/parameter_server/desk.py",
        "waiting.layout == call.layout and least",
        "least",
        "parameter_server_faults",
    ),
    Bug(
        "a round closes by ranks instead of workers",
        "transports/parameter_server/desk.py",
        "return sum(self.asked[rank] for rank in self.bodies)",
        "return 3 * len(self.bodies)",
        "parameter_server",
    ),
    Bug(
        "who comes back has lost its mirror",
        "algorithms/byz_ef21_sgdm.py",
        "._replace(g=server.g[worker].clone())",
        "",
        "parameter_server",
    ),
    Bug(
        "who is behind computes",
        "strategies/workers.py",
        "if strategy.processes.is_behind:",
        "if False:",
        "parameter_server",
    ),
    # suspicion, quarantine, resuming, grids
    Bug(
        "all partners speak for who is extreme",
        "diagnostics/suspicion.py",
        "_surely_above(table, len(some) - f - 2)",
        "_surely_above(table, len(some) - 2)",
        "suspicion",
    ),
    Bug("any one nearer worker makes another gross", "diagnostics/suspicion.py", "beyond >= f + (honest + 1) // 2", "beyond >= 1", "suspicion"),
    Bug("a step fails for the absence of the accused", "aggregators/base.py", "max(0, remaining - accused)", "remaining", "exchange"),
    Bug(
        "quarantine takes one from f",
        "engine/server_side.py",
        "& ~present & ~left_out",
        "& ~present | left_out",
        "exchange",
    ),
    Bug("mirrors keep their places", "strategies/resuming_with_others.py", "saved.index_select(dim, old)", "saved.index_select(dim, new)", "resuming"),
    Bug("what has moved is said not to", "strategies/unmoved_parameters.py", "and p not in self._moved", "", "few_users"),
    Bug("what a cut-short cell left stays", "cli/grids.py", "shutil.rmtree(folder)", "return", "grids"),
    Bug("who failed is worst by the rest", "cli/reports.py", 'if any(notes.get((i, j)) == "failed"', 'if any(notes.get((i, j)) == "no"', "grids"),
]


def run_tests(copy: Path, tests: str, log: Path) -> tuple[int, str]:
    """(exit code of pytest, first test that failed), in a child of its own that imports the package from the copy."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                files = [f"tests/test_{name}.py" for name in tests.split()]
                status = int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *files]))
                used = getattr(sys.modules.get("lightning_byz"), "__file__", "")
                print(f"\nUSED {used}", flush=True)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = log.read_text().splitlines()
    if not any(line.startswith(f"USED {copy}") for line in lines):
        return 99, "the tests did not run the copy"
    failed = next((line.split(" ")[1].removeprefix("tests/") for line in lines if line.startswith("FAILED ")), "")
    return status, failed or lines[-2]


def main(wanted: list[str]) -> int:
    bugs = [bug for bug in BUGS if not wanted or any(part in bug.name for part in wanted)]
    started, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for part in ("lightning_byz", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for bug in bugs:
            path, began = copy / "lightning_byz" / bug.file, time.monotonic()
            source = path.read_text()
            if source.count(bug.old) != 1:
                caught, verdict = False, f"ITS PLACE IS GONE: found {source.count(bug.old)} times in {bug.file}"
            else:
                path.write_text(source.replace(bug.old, bug.new))
                status, failed = run_tests(copy, bug.tests, copy / "log.txt")
                path.write_text(source)
                caught = status == 1  # tests ran and failed; anything else is no verdict
                verdict = failed if caught else f"SURVIVED (pytest: {status}, {failed})"
            bad += not caught
            print(f"{bug.name:52s} | {time.monotonic() - began:4.1f} s | {verdict}", flush=True)
    print(f"{len(bugs) - bad} of {len(bugs)} bugs caught in {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    # Loaded once and inherited by every child: all that is slow to import, but nothing of the package itself.
    import importlib.util

    import hypothesis  # noqa: F401
    import pytest
    import torch

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    sys.exit(main(sys.argv[1:]))
