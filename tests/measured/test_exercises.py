"""The graders, graded: right answers pass in every form, wrong ones do not, and the usual ones get their hint."""

import copy
import inspect
import itertools
import math
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from dslib.architecture.cache import Step
from dslib.architecture.config import DecoderConfig
from dslib.architecture.generation import Sampling
from dslib.architecture.layers import Attention, Block, SwiGLU, rope_angles
from measured import exercises
from measured.exercises import Exercise

ALL = {exercise.name: exercise for exercise in exercises.all_exercises()}
MISTAKES = [
    pytest.param(name, *mistake, id=f"{name}-{number}")
    for name, exercise in ALL.items()
    for number, mistake in enumerate(exercise.wrong_answers())
]

# Further answers, as expressions in the arguments: right ones found in another way, and wrong ones that no hint names.
RIGHT = {
    "accuracy/interval": "[max(0.0, end) for end in interval(right, n)]",
    "accuracy/choose": "np.argmax([np.mean(logs) for logs in token_logs])",
    "accuracy/letter": "torch.tensor([logits[vocabulary[' ' + x]] for x in 'ABCD']).argmax()",
    "adapters/start": "np.concatenate([down, np.zeros_like(up.T), np.zeros((1, len(shift)))])",
    "adapters/merge": (
        "None if weights[name].dtype == torch.uint8 or sum(w.untyped_storage().data_ptr() == weights[name]"
        ".untyped_storage().data_ptr() for w in weights.values()) > 1 else weights[name] + torch.einsum('or,ri->oi', B,"
        " A) * alpha / A.shape[0]"
    ),
    "adapters/packed": (
        "(lambda rows: x @ W.T + torch.einsum('si,sri,sor->so', x, torch.cat((A, A[:1] * 0))[rows], (torch.tensor("
        "[*scales, 0])[:, None, None] * torch.cat((B, B[:1] * 0)))[rows]))(torch.tensor(adapters).repeat_interleave("
        "torch.tensor(lengths)))"
    ),
    "adapters/unfair": (
        "[n for n, (a, b) in enumerate(reports) if (lambda at, old: at(a) >= at(b))(*(lambda level: (lambda path: "
        "np.interp(-level, *([-p[0] for p in path], [p[1] for p in path])), None))(max(a[-1][0], b[-1][0])))]"
    ),
    "advice/grade": (
        "'met' if (f := lambda end: all(any(d <= end and d <= on and s == c and t[0] != 'u' for d, s, t in evidence) "
        "for c in conditions))(deadline) else 'open' if on <= deadline else 'met late' if f(on) else 'partly' if any("
        "d <= on and s in conditions and t != 'unverified' for d, s, t in evidence) else 'not met'"
    ),
    "advice/skill": (
        "(lambda p, y, b: 1 - ((p - y) ** 2).mean() / ((b - y) ** 2).mean())(np.array(probabilities), np.array("
        "outcomes), np.mean([0, 1, *earlier]))"
    ),
    "advice/rules": (
        "(lambda g: [n for n, d in enumerate(days) if g(one, d) != g(other, d)])(lambda r, on: (lambda f: 'met' if "
        "f(r['by']) == len(r['needs']) else 'open' if on <= r['by'] else 'met late' if f(on) == len(r['needs']) else "
        "'partly' if f(on) else 'not met')(lambda end: len({w for d, w in seen if w in r['needs'] and r['opens'] <= d "
        "<= min(on, end)})))"
    ),
    "balance/bias-update": (
        "torch.stack([b + speed * (n.float().mean() - n).sign() for b, n in zip(bias, (torch.stack([(layer[mask] == e)"
        ".sum() for e in range(len(bias[0]))]) for layer in indices))])",
        "(bias.numpy() + speed * np.sign(mask.sum().item() * indices.shape[2] / bias.shape[1] - np.array([np.bincount("
        "layer[mask].numpy().ravel(), minlength=bias.shape[1]) for layer in indices]))).tolist()",
    ),
    "balance/sequence-loss": (
        "np.mean([sequence_loss(s[m][None], m[m][None], top_k) for s, m in zip(scores, mask)])",
        "torch.stack([(torch.bincount(s[m].topk(top_k).indices.flatten(), minlength=s.shape[1]) * s.shape[1] / top_k /"
        "m.sum() * (s[m] / s[m].sum(1)[:, None]).mean(0)).sum() for s, m in zip(scores, mask)]).mean()",
    ),
    "balance/judge": (
        "(lambda d: next(('free' if d.mean() + h(len(d)) < margin else 'costs' if d.mean() > h(len(d)) else n) for h in"
        " [lambda n: t * d.std() / n**0.5] for n in range(2, 999) if h(n) < max(d.mean(), margin - d.mean())))("
        "torch.tensor(cured, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64))",
        "(lambda m, s: (lambda h: 'free' if h < margin - m else 'costs' if h < m else float(math.ceil((t * s / max(m,"
        " margin - m)) ** 2)))(t * s / len(base) ** 0.5))(sum(cured) / len(base) - sum(base) / len(base), _sd(np.array("
        "cured) - np.array(base)))",
    ),
    "balance/served": (
        "torch.tensor(served(indices, num_experts, capacity_factor))",
        "(lambda hot, room: ((hot.cumsum(0) * hot).sum(1) <= room).view(indices.shape[1], -1).sum(0))"
        "(torch.nn.functional.one_hot(indices.T.flatten(), num_experts),"
        "int(capacity_factor * indices.numel() / num_experts + 1e-9))",
    ),
    "cache/padded": (
        "torch.where(real[:, -q.shape[1] :, None], torch.nn.functional.scaled_dot_product_attention(rope(q.double(),"
        " 5 + (at := real.cumsum(1))[:, -q.shape[1] :]), rope(k.double(), 5 + at), v.double(), attn_mask=("
        "real[:, None] & torch.ones(*at.shape[1:] * 2).tril().bool() | torch.eye(*at.shape[1:]).bool())"
        "[:, -q.shape[1] :]), 0)",
        "[alone(*row) for row in zip(q, k, v, real)]",
    ),
    "cache/ring-piece": (
        "_through_ring(*(x.double() for x in (q, k, v)), start, held_k.double(), held_v.double()).numpy()",
        "(lambda steps: [*(step[0].tolist() for step in steps), *steps[-1][1:].tolist()])([*itertools.accumulate("
        "range(len(q)), lambda ring, i: _through_ring(q[i : i + 1], k[i : i + 1], v[i : i + 1], start + i,"
        " *ring[1:].chunk(2)), initial=torch.cat((q[:1], held_k, held_v)))][1:])",
    ),
    "cache/slots": (
        "next(size for size in itertools.count(1) if keeps_all(size, window, steps))",
        "max(np.maximum.accumulate(at) - np.maximum(0, at - window + 1)) + 1 if (at := np.concatenate("
        "[np.arange(n, n + max(0, s)) for n, s in zip(np.cumsum([0, *steps]), steps)])).size else 0",
    ),
    "choose/only": (
        "(lambda need: (lambda a, b: (a, b) if a < b else None)(need(pick)[1], min([need(n)[0] for n in options if n !="
        " pick] + [math.inf])))(lambda n: [(options[n][i] + users * options[n][2]) / (1 - reserve) for i in (0, 1)])"
    ),
    "choose/nearest": (
        "(lambda far: None if not all(any(f[k][0] > limits[k] for k in limits) for f in options.values()) else "
        "sorted(far, key=lambda n: (len(far[n]), max(far[n])))[0])"
        "({n: [f[k][1] / limits[k] for k in limits if f[k][1] > limits[k]] for n, f in options.items()})"
    ),
    "choose/fraction": (
        "(lambda says: (max(says[True]), min(says[False])))"
        "({want: [n / m for n, m, said in answers if bool(said) is want] for want in (True, False)})"
    ),
    "complex/limits": (
        "np.mean([(p and p / (p + max([0, *w])), p and np.mean([one < p for one in w if one >= p] + [1])"
        " * (max([0, *w]) <= p)) for p, w in problems], axis=0).tolist()"
    ),
    "complex/needed": (
        "int(np.ceil(np.var([np.mean([(h.count(t) == max(map(h.count, set(h) - {None}), default=0) > 0) / max(1, sum("
        "h.count(x) == h.count(t) for x in set(h) - {None})) for h in itertools.combinations(a, k)]) - float(g == t)"
        " for a, g, t in problems], ddof=1) * (2.8 / lead) ** 2))"
    ),
    "cost/replicas": "-(-seconds * peak * requests_per_day / 86_400 // utilisation) + redundancy",
    "cost/break-even": "unless_none(break_even(usd_per_day, capacity, usd_per_request), math.ceil)",
    "decoder/parameters": (
        "hidden * (vocabulary * (2 - tied) + 1) + layers * sum(rows * columns for rows, columns in ((hidden, hidden),"
        " (hidden, hidden), (2 * hidden * kv_heads / heads, hidden), (3, hidden * inner), (2, hidden)))",
        "np.dot([vocabulary * (1 if tied else 2) + 2 * layers + 1, layers * (2 * hidden + 3 * inner), 2 * layers"
        " * kv_heads], [hidden, hidden, hidden * hidden // heads])",
    ),
    "decoder/rms-norm": (
        "F.rms_norm(x.float(), x.shape[-1:], 1 + offset.float(), eps)",
        "(x.float() * x.float().pow(2).mean(-1, True).add(eps).rsqrt() * (1 + offset.float())).to(x.dtype)",
        "np.stack([row / math.sqrt(row @ row / len(row) + eps) * (1 + offset.numpy())"
        " for row in x.double().numpy().reshape(-1, x.shape[-1])]).reshape(x.shape)",
    ),
    "decoder/rope": (
        "torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * (1j * _angles(x, positions, base)).exp())"
        ".flatten(-2)",
        "[[[turned_number(head, p, base, i) for i in range(len(head))] for head in token.tolist()]"
        " for token, p in zip(x, positions.tolist())]",
    ),
    "decoder/grouped-attention": (
        "F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), enable_gqa=True, attn_mask="
        "torch.ones(len(q), len(k)).bool().tril(len(k) - len(q)))[0].transpose(0, 1)",
        "[[one_query(q[t, h], *(x[: len(k) - len(q) + t + 1, h * k.shape[1] // q.shape[1]] for x in (k, v))).tolist()"
        " for h in range(q.shape[1])] for t in range(len(q))]",
        "grouped_attention(q.float(), k.float(), v.float())",
    ),
    "decoder/swiglu": (
        "torch.einsum('...f,cf->...c', F.silu(x @ gate_up[::2].T) * (x @ gate_up[1::2].T), down).float()",
        "np.tanh((both := (x @ gate_up.T).numpy())[..., ::2] / 2).__add__(1) / 2 * both[..., ::2] * both[..., 1::2]"
        " @ down.numpy().T",
    ),
    "decoder/block": (
        "library_block(x, w, head_dim, torch.float64)",
        "library_block(x, w, head_dim, torch.float32).numpy()",
    ),
    "depth/batch": "torch.tensor(depths).amax(0).sum()",
    "does_it_help/pairs": (
        "next(n for n in itertools.count(2) if n * effect**2 * stats.chi2(len(differences) - 1).ppf(1 - sure) >= "
        "np.square(np.array(differences) - np.mean(differences)).sum() * sum(stats.t(n - 1).ppf([0.975, 0.8])) ** 2)"
    ),
    "does_it_help/pace": (
        "(lambda level: torch.tensor(np.interp(-level, *(np.array(base).T[::-1] * [[-1], [1]])) / np.interp(-level, "
        "*(np.array(arm).T[::-1] * [[-1], [1]]))))(max(arm[-1][1], base[-1][1]))"
    ),
    "does_it_help/fair": (
        "torch.tensor([n for n, (a, b) in enumerate(reports) if (a['rates'], a['seeds'], a['text']) == (b['rates'], "
        "b['seeds'], b['text']) and (a['schedule'] + b['schedule'] == 0 or [a['steps'], b['steps']] == [a['schedule'],"
        " b['schedule']])])"
    ),
    "fusion/gate": "(x.double() + math.tanh(alpha) * answer).tolist()",
    "int4/unpack": "[code for byte in packed.tolist() for code in (byte % 16, byte // 16)]",
    "load/knee": (
        "(lambda kept: ([r for r in runs if all(kept[q] for q in runs if q <= r)] or [None])[-1])"
        "({r: np.mean([len(t) > 0 and t[0] <= ttft and t[-1] - t[0] <= tpot * (len(t) - 1) for t in runs[r]])"
        " >= share for r in runs})"
    ),
    "load/honest": (
        "np.array([np.quantile([t[0] - d for d, t in zip(due, tokens) if d >= warm], 0.99),"
        " np.percentile(np.concatenate([np.diff(t) for d, t in zip(due, tokens) if d >= warm]), 99)])"
    ),
    "load/cards": (
        "next(c for c in itertools.count(1) if sum(wait <= limit for wait in _shared(arrivals, service, c))"
        " / len(arrivals) >= share)"
    ),
    "moe/fills": (
        "int(np.argmax(2 * (n := np.arange(1, 10**4)) * sum(chance) / rate >= bytes_a_weight / bandwidth * (1 - (1 -"
        " np.array(chance)[:, None]) ** n).sum(0))) + 1",
        "(lambda late: min(range(1, 4096), key=lambda n: (not late(n), n)))(lambda n: n * math.fsum(chance) * 2 *"
        " bandwidth >= rate * bytes_a_weight * math.fsum(1 - math.exp(n * math.log1p(-p)) if p < 1 else 1.0 for p in"
        " chance))",
    ),
    "moe/places": (
        "np.argsort(np.argsort(indices.numpy().ravel(), kind='stable')).reshape(indices.shape)",
        "(indices.flatten()[:, None] > indices.flatten()).sum(1).view_as(indices).int() + _in_slice(indices)",
        "torch.empty(indices.numel()).scatter(0, indices.flatten().argsort(stable=True), torch.arange("
        "indices.numel() * 1.0)).view_as(indices)",
    ),
    "moe/busiest": (
        "(len(loads) + spare) / sum(loads) * min(t for t in (a / n for a in loads for n in range(1, spare + 2)) if"
        " sum(math.ceil(a / t - 1e-9) for a in loads) <= len(loads) + spare)",
        "np.max(np.array(loads) / (lambda dealt: np.bincount([e for _, e in dealt], minlength=len(loads)) + 1)(sorted("
        "((a / n, e) for e, a in enumerate(loads) for n in range(1, spare + 1)), reverse=True)[:spare])) / sum(loads)"
        " * (len(loads) + spare)",
    ),
    "moe/configuration": (
        "configuration(config, logits.float(), bias.float()).numpy()",
        "(lambda s, c: config['routed_scaling_factor'] * (lambda t: t / t.sum(1, keepdim=True)"
        " if config['norm_topk_prob'] else t)(torch.stack([torch.zeros_like(r).index_put((i,), r[i]) for r, i in"
        " zip(s, c.topk(config['num_experts_per_tok']).indices)])))(*(lambda s: (s, (lambda c: c if 'greedy' =="
        " config['topk_method'] else c + torch.cat([torch.where((g := r.view(config['n_group'], -1).sort(1).values[:,"
        " -(1 + ('noaux_tc' == config['topk_method'])):].sum(1)) >= g.sort().values[-config['topk_group']], 0.0,"
        " -math.inf).repeat_interleave(len(r) // config['n_group'])[None] for r in c]))(s + bias"
        " if config['topk_method'] == 'noaux_tc' else s)))(getattr(torch, config['scoring_func'])("
        "logits, *[-1] * (config['scoring_func'] == 'softmax'))))",
    ),
    "multimodal/resized": "[side * shorter // min(width, height) for side in (width, height)]",
    "multimodal/recall": "np.mean([i in row.argsort(descending=True)[:k] for i, row in enumerate(scores)])",
    "published/tokens-a-pass": "(1 - acceptance ** (drafts + 1)) / (1 - acceptance)",
    "realtime/has-error": (
        "(lambda asked: int(any(serve(asked, blocks) != ([serve([(0, *rest)], 50)[0][0] for _, *rest in asked], blocks)"
        " for blocks in (6, 40))))([(2 * n, [first] * 4 + [then] * size, 9 + n % 3) for n, (first, then, size) in"
        " enumerate(itertools.product((1, 2), (1, 3), (4, 1, 4, 8)))])",
        "int(any((lambda asked: any(serve([one], 30)[0][0] != text for one, text in zip(asked, serve(asked, 9)[0])) or"
        " serve(asked, 9)[1] < 9)([(int(n), [*dice.choice(3, dice.integers(1, 4)).repeat(4), *range(dice.choice((0, 1,"
        " 2)))], int(dice.integers(1, 16))) for n in range(10)]) for dice in map(np.random.default_rng, range(20))))",
    ),
    "realtime/leaked": (
        "(lambda n: [2 * bool(n[b] and (b in free or holders[b] < n[b])) or int(b not in free and (holders[b] > n[b] or"
        " n[b] == 0)) for b in range(len(n))])(np.bincount([b for t in tables for b in t], minlength=len(holders)))"
    ),
    "realtime/evict": (
        "(lambda behind: [b for _, _, b in sorted((used[b], -len(behind(b)), b) for b in range(len(used)))][:need])"
        "(lambda b: [*itertools.takewhile(lambda x: x is not None, itertools.accumulate(itertools.repeat(b, len(used)),"
        " lambda x, _: None if x is None else parents[x]))])",
    ),
    "realtime/chunk": (
        "next((c for c in sorted(chunks, reverse=True) if (lambda gaps: (gaps > limit).mean() <= allowed and gaps.max()"
        " <= never)(np.array(_gaps(prompts, c, fixed, per_token)))), None)"
    ),
    "reasoning/group-size": (
        "next((g for g in range(2, 1025) if np.mean([1 - q**g - (1 - q) ** g for q in chances]) >= wanted), 0)"
    ),
    "reasoning/faults": (
        "int(np.argmin([abs(np.mean([((lambda r, d: beta * (d.exp() - d - 1) - (torch.maximum if n % 2 else"
        " torch.minimum)(r * a, r.clamp(0.8, 1.2) * a))((x - o).exp(), (f - x) * (1 - n // 4 * 2))[(m > 0) | (n // 2 %"
        " 2 > 0)]).mean().item() for x, o, a, m, f in zip(new, old, advantage, mask, reference)]) - value)"
        " for n in range(8)]))"
    ),
    "reasoning/kept": (
        "[(x[y] / x[k].sum() / (o[y] / o[k].sum())).item() for x, o, y in zip(new, old, drawn)"
        " for k in [[v for v in range(len(o)) if o[o > o[v]].sum() < top_p]]]"
    ),
    "reasoning/alarm": (
        "min(sorted((np.mean(log[len(log) // 2 :]) for log in logs), reverse=True), key=lambda line: sum(miss * (end <"
        " 0.2 and np.mean(log[len(log) // 2 :]) < line) + false_alarm * (end >= 0.2 and np.mean(log[len(log) // 2 :])"
        " >= line) for log, end in zip(logs, ends)))"
    ),
    "sampling/temperature": ("math.log(ratio, wanted)", "np.log2(ratio) / np.float64(math.log2(wanted))"),
    "sampling/top-k-top-p": (
        "torch.stack([TopPLogitsWarper(float(q))(None, TopKLogitsWarper(k)(None, row[None].clone()))[0]"
        " for row, q in zip(logits, p)])",
        "[[float(x) if (r > x).sum() < k and r[r > x].exp().sum() < q * r.topk(k).values.exp().sum() else -np.inf"
        " for x in r] for r, q in zip(logits.double(), p.double())]",
    ),
    "sampling/penalty": (
        "logits * (theta ** -logits.sign()) ** written",
        "np.where(written, np.minimum(logits.numpy() * theta, logits.numpy() / theta), logits)",
    ),
    "sampling/shift": (
        "(logits - logits.logsumexp(-1, keepdim=True)) * theta**written",
        "np.where(written, theta, 1) * np.log(logits.double().softmax(-1).numpy())",
    ),
    "sampling/shown": (
        "re.split('|'.join(map(re.escape, stops)), text, maxsplit=1)[0] if any(s in text for s in stops) else"
        " next(text[:i] for i in range(len(text) + 1) if any(s.startswith(text[i:]) for s in stops))",
        "text[: min([text.find(s) for s in stops if s in text]"
        " or [len(text) - max(n for s in stops for n in range(len(s)) if text.endswith(s[:n]))])]",
    ),
    "speculation/choose-k": (
        "int(np.argmax((1 + np.array([np.minimum(range(len(histogram)), k) @ np.array(histogram) for k in range(len("
        "histogram))]) / sum(histogram)) / (np.arange(len(histogram)) * guess_cost + pass_cost)))",
        "(lambda at_least: max(range(len(pass_cost)), key=lambda k: (at_least[0] + sum(at_least[1 : k + 1])) / (k * "
        "guess_cost + pass_cost[k])))([sum(histogram[n:]) for n in range(len(histogram))])",
    ),
    "speculation/verifier": (
        "(lambda p, q: (lambda k: [held + 1 + k, *(lambda left: left / left.sum())((p[k] - q[k]).clamp(min=0))])(next(("
        "n for n, x in enumerate(guesses) if q[n, x] * uniforms[n] >= p[n, x]), len(guesses))))(*(Sampling(1.0, top_p="
        "top_p).probabilities(torch.tensor([*rows, *more])) * torch.tensor([[1]] * len(rows) + [[0]] * len(more)) for"
        " rows, more in ((logits, []), (draft_logits, logits[:1]))))"
    ),
    "speculation/scheduler": (
        "(lambda p, q, look: (lambda rest: torch.minimum(p, q) * look + ((q - p).clamp(min=0) * look).sum() * rest /"
        " rest.sum() + (q * ~look).sum() * p)((p - q).clamp(min=0)))(*(torch.tensor(one) for one in (p, q, checked)))"
    ),
    "speculation/mixture": (
        "(lambda r: 1 + max((n for n in range(1, 3000) if a * r(n) + r(n) <= guess + r(2 * n)), default=0))(lambda n: "
        "used + routed / top_k * (num_experts - top_k - num_experts * (1 - top_k / num_experts) ** n))"
    ),
    "training/clip": "np.array(gradient) / max(scale, math.hypot(*gradient) / max_norm)",
    "training/accumulate": "np.mean(list(itertools.chain(*parts)))",
    "upcycling/rules": (
        "[n for n, r in enumerate(rules) if r['shared'] or not r['chosen'] % slices and r['factor'] == slices"
        " and (r['renormalise'] or r['scores'] == 'softmax' and r['chosen'] == copies * slices)]",
        "np.flatnonzero([r['shared'] or bool((r['renormalise'] or (r['scores'], r['chosen']) == ('softmax', copies *"
        " slices)) and r['factor'] == slices and r['chosen'] / slices == r['chosen'] // slices) for r in rules])",
    ),
    "upcycling/slice-weights": (
        "(lambda z: torch.cat([z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf).softmax(1)] * slices, 1))"
        "(x.double() @ rows.double().T)",
        "[[weight for _ in range(slices) for weight in _slice_weights(one[None], rows, top_k, 1)[0].tolist()]"
        " for one in x]",
    ),
    "upcycling/gate": (
        "[n for n, d in enumerate((after - before).numpy()) if not (np.isfinite(d).all() and d.mean() + 2 *"
        " d.std(ddof=1) / len(d) ** 0.5 <= limit)]",
        "(~((after - before).mean(1) + 2 * (after - before).var(1).div(before.shape[1]).sqrt() <= limit)"
        " | ~after.isfinite().all(1)).nonzero().flatten()",
    ),
    "upcycling/split": (
        "torch.stack([torch.cat((gate_up[units], gate_up[len(order) + units], down[:, units].T)) for units in"
        " order.chunk(slices)])",
        "np.stack([np.concatenate([gate_up[: len(order)][u], gate_up[len(order) :][u], down.T[u]]) for u in"
        " order.view(slices, -1).numpy()])",
    ),
    "whole/beyond": (
        "(lambda f: f(torch.arange(len(sources))) - np.mean([f(order) for order in orders]))(lambda order:"
        " _information((64 * token + sources[order[document]])[token.bincount()[token] >= at_least],"
        " chosen[token.bincount()[token] >= at_least]))",
    ),
    "whole/crossing": (
        "(lambda fit: 10 ** ((math.log10(line) - fit[1]) / fit[0]))(np.polyfit(np.log10(tokens), np.log10(bits), 1))",
    ),
}
WRONG = {
    "accuracy/interval": ("interval(right, 2 * n)", "interval(n - right, n)"),
    "accuracy/paired": ("difference(a, [0] * len(a))", "abs(difference(a, b)[0])"),
    "accuracy/choose": (
        "max(map(np.mean, token_logs))",
        "_best(token_logs, min)",
        "_best(token_logs, len)",
        "_best(token_logs, lambda logs: min(logs) + max(logs))",
        "_best(token_logs, lambda logs: -np.linalg.norm(logs) / len(logs) ** 0.5)",
    ),
    "accuracy/letter": ("np.argmax(logits[4:8])", "np.argmax(logits)", "'ABCD'[letter(logits, vocabulary)]"),
    "adapters/start": (
        "start(down, up, shift) / 2",
        "start(down, up, shift).flatten()",
        "torch.cat((shift[None] * 0, down, up.T * 0))",
    ),
    "adapters/merge": (
        "weights[name]",
        "merge(weights, name, A, B, 2 * alpha)",
        "None if merge(weights, name, A, B, alpha) is None else weights[name] - alpha / len(A) * B @ A",
    ),
    "adapters/packed": (
        "2 * packed(x, W, A, B, scales, lengths, adapters)",
        "packed(x, W, A, B, scales, lengths, adapters[::-1])",
        "packed(x, W, A, B, scales, lengths, [max(adapter, 0) for adapter in adapters])",
    ),
    "adapters/unfair": (
        "unfair(reports)[:1]",
        "list(range(len(reports)))",
        "[n for n, (one, other) in enumerate(reports) if one[1][1] > other[1][1]]",
    ),
    "advice/grade": (
        "'met'",
        "verdict(on, conditions, evidence, on)",
        "verdict(deadline, conditions[:1], evidence, on)",
        "verdict(deadline, conditions, evidence[::-1][:1], on)",
    ),
    "advice/skill": (
        "skill(probabilities, outcomes, earlier[1:])",
        "skill(outcomes, outcomes, earlier)",
        "skill([1 - p for p in probabilities], outcomes, earlier)",
    ),
    "advice/rules": (
        "list(range(len(days)))",
        "disagree(one, other, seen[:1], days)",
        "disagree(one, dict(other, opens=one['opens']), seen, days)",
        "disagree(one, other, seen, days)[:1]",
        "[n for n, on in enumerate(days) if one['by'] < on <= other['by']]",
    ),
    "balance/bias-update": ("new_bias(bias, indices, mask, 2 * speed)", "new_bias(bias, indices, ~mask, speed)"),
    "balance/sequence-loss": (
        "sequence_loss(scores, mask, top_k - 1)",
        "sequence_loss(scores.softmax(-1), mask, top_k)",
        "round(sequence_loss(scores, mask, top_k))",
    ),
    "balance/judge": (
        "'open'",
        "judge(cured, base, margin / 2, t)",
        "judge(cured, base, margin, 1.96)",
        "judge(cured[:3], base[:3], margin, t)",
    ),
    "balance/served": (
        "served(indices[:, :1], num_experts, capacity_factor)",
        "served(indices, num_experts, 2 * capacity_factor)",
        "[indices.shape[1]] * len(indices)",
    ),
    "cache/padded": (
        "attend_padded(q, k, v, real) * 2",
        "attend_padded(q, k, v, real.flip(0))",
        "_padded(q, k, v, real, at=torch.zeros_like(real).long())",
        "attend_padded(q, k, v, torch.ones_like(real)) * real[:, -q.shape[1] :, None]",
    ),
    "cache/ring-piece": (
        "_through_ring(q * 0, k, v, start, held_k, held_v)",
        "_through_ring(q, k, v, start, held_v, held_k)",
        "_through_ring(q, k, v, start + 1, held_k, held_v)",
    ),
    "cache/slots": (
        "slots_needed(window + 1, steps)",
        "slots_needed(window, [step for step in steps if step > 0])",
        "sum(step for step in steps if step > 0)",
        "sum(steps)",
    ),
    "choose/only": ("(0.0, math.inf)", "only(pick, options, users + 1, reserve)", "options[pick][:2]"),
    "choose/nearest": ("min(options)", "max(options)", "'z'"),
    "choose/fraction": ("1.0", "[0.9, 0.9]", "fraction(answers)[::-1]"),
    "complex/limits": ("limits(problems)[::-1]", "limits(problems)[:1]", "[0.5, 0.5]", "limits(problems[:1])"),
    "complex/needed": (
        "needed(problems[:-1], k, lead)",
        "needed(problems, k, 0.05)",
        "needed(problems, 1, lead)",
        "len(problems)",
    ),
    "cost/per-million": ("usd_per_gpu_hour * gpus / tokens_per_second * utilisation",),
    "cost/replicas": (
        "math.ceil(math.ceil(requests_per_day / 86_400 * peak * seconds) / utilisation) + redundancy",
        "math.ceil(math.ceil(requests_per_day / 86_400 * peak) * seconds / utilisation) + redundancy",
        "round(requests_per_day / 86_400 * peak * seconds / utilisation) + redundancy",
        "round(requests_per_day / 86_400 * peak * seconds / utilisation + 0.5) + redundancy",
        "math.ceil(requests_per_day / 3600 * peak * seconds / utilisation) + redundancy",
    ),
    "cost/break-even": ("usd_per_request / usd_per_day", "break_even(usd_per_day, capacity, usd_per_request) or 0"),
    "cost/profit-ratio": ("profit_ratio(usd_per_day, tokens | {'output': 0}, prices, billed)",),
    "decoder/parameters": (
        "parameters(vocabulary, hidden, layers, kv_heads, heads, inner, tied)",
        "parameters(vocabulary, hidden, layers + 1, heads, kv_heads, inner, tied)",
        "parameters(vocabulary, hidden, layers, heads, kv_heads, inner, tied) / 1e9",
    ),
    "decoder/rms-norm": ("rms_norm(x, offset, 10 * eps)", "rms_norm(x, -offset, eps)", "rms_norm(x, offset, eps)[0]"),
    "decoder/rope": (
        "rope(x, positions + 1, base)",
        "torch.cat((x[..., :2], rope(x, positions, base)[..., 2:]), -1)",
        "rope(x, positions, base).transpose(0, 1)",
    ),
    "decoder/grouped-attention": (
        "grouped_attention(q, k, k)",
        "grouped_attention(q, k, v).flatten(1)",
        "_attend(q, k, v, see=lambda query, key, before: (key <= query + before) & (key > query + before - 2))",
    ),
    "decoder/swiglu": (
        "F.relu(x @ gate_up[::2].mT) * (x @ gate_up[1::2].mT) @ down.mT",
        "swiglu(x, gate_up.flip(0), down)",
    ),
    "decoder/block": (
        "block(x, w, head_dim) - x",
        "block(x, w | {'q': w['q'].flip(0)}, head_dim)",
        "block(x, w | {'o': 0 * w['o']}, head_dim)",
    ),
    "depth/exit": (
        "exit_depth(confidence[min_layers - 1 :], threshold, 1)",
        "exit_depth(confidence[:-1], threshold, min_layers)",
    ),
    "depth/batch": ("len(depths[0]) * max(map(max, depths))", "sum(map(max, depths))"),
    "does_it_help/pairs": ("pairs(differences, effect, sure) + 1", "2 * pairs(differences, effect, sure)"),
    "does_it_help/pace": ("break_even(arm, base) - 1", "arm[0][0] / base[0][0]"),
    "does_it_help/fair": ("list(range(len(reports)))", "[]"),
    "fusion/gate": ("x + math.tanh(alpha)", "answer + math.tanh(alpha) * x", "x.add_(math.tanh(alpha) * answer)"),
    "fusion/matching": ("(scores.argmax(-1) == 0).double().mean().item()", "100 * right_choices(scores)"),
    "fusion/gain": ("after - before", "(14.0, 100 * 14 / 78)"),
    "int4/levels": ("(codes - 7) * scale + zero", "(codes - 8) * scale[0] + zero[0]", "levels(codes, scale, zero).T"),
    "int4/encode": ("encode(groups.abs())", "15 - encode(groups)", "_between(groups, -groups.amax(), groups.amax())"),
    "int4/unpack": ("unpack(packed).view(-1, 2)", "packed & 15"),
    "int4/bytes": ("rows * columns // 2 + columns * (rows // group_size) * 4",),
    "load/knee": ("max(runs)", "min(runs)", "knee(runs, tpot, ttft, share)"),
    "load/honest": (
        "honest(due, sent, tokens, warm)[::-1]",
        "honest(due, sent, tokens, warm)[:1]",
        "[np.mean([t[0] - d for d, t in zip(due, tokens)]), 0.0]",
    ),
    "load/cards": ("1", "len(arrivals)", "cards(arrivals, service, limit, share / 2)"),
    "moe/fills": (
        "fills(chance, bytes_a_weight, rate, bandwidth)",
        "fills(chance, bytes_a_weight, bandwidth, rate) + 1",
        "len(chance)",
    ),
    "moe/places": ("places(indices) + 1", "places(indices.flip(1))", "torch.argsort(indices, 0)"),
    "moe/busiest": ("busiest(loads, spare + 1)", "max(loads) / sum(loads)", "busiest(loads[::-1], spare) + 0.1"),
    "moe/configuration": (
        "configuration(config, -logits, bias)",
        "configuration(config, logits, bias) > 0",
        "_by_rule(config, logits, bias, biased=())[:1]",
    ),
    "multimodal/resized": (
        "tuple(round(side * shorter / min(width, height)) for side in (width, height))",
        "(shorter * width // height, shorter)",
    ),
    "multimodal/canvas": ("best_canvas(width, height, tile, max_tiles - 1)", "(max_tiles, max_tiles)"),
    "multimodal/recall": ("recall(scores, k - 1)", "1 - recall(scores, k)"),
    "published/latent-elements": ("layers * (kv_lora_rank + 2 * qk_rope_head_dim)",),
    "published/tokens-a-pass": ("tokens_a_pass(acceptance, drafts - 1)", "acceptance**drafts", "1 / (1 - acceptance)"),
    "realtime/has-error": (
        "1",
        "0",
        "_has_error(serve, prompts=RELATIVES[:1])",
        "_has_error(serve, prompts=RELATIVES[:3])",
    ),
    "realtime/leaked": (
        "audit(holders, tables, [])",
        "[int(block not in free) for block in range(len(holders))]",
        "[counted > 0 for counted in holders]",
    ),
    "realtime/evict": (
        "list(range(need))",
        "evict(parents, used, need)[::-1]",
        "evict(parents, used, need - 1)",
        "evict([None] * len(used), used, need)",
    ),
    "realtime/chunk": (
        "max(chunks)",
        "chunks[-1]",
        "largest_chunk(prompts, chunks, fixed, per_token / 2, limit, allowed, never)",
    ),
    "reasoning/group-size": (
        "group_size(chances, wanted / 2)",
        "group_size(chances, wanted) + 1",
        "group_size([0.5] * len(chances), wanted)",
    ),
    "reasoning/faults": (
        "0",
        "faults(new, old, advantage, mask, reference, beta, -value)",
        "faults(old, new, advantage, mask, reference, beta, value)",
        "faults(new, old, advantage, mask, reference, 0.0, value)",
    ),
    "reasoning/kept": (
        "kept(old, new, drawn, top_p)",
        "kept(new, old, drawn, 1.0)",
        "kept(new, old, [0] * len(drawn), top_p)",
    ),
    "reasoning/alarm": (
        "0.15",
        "max(np.mean(log[len(log) // 2 :]) for log in logs)",
        "alarm([log[:5] for log in logs], ends, miss, false_alarm)",
        "alarm(logs, [1 - end for end in ends], miss, false_alarm)",
    ),
    "sampling/temperature": ("wanted / ratio", "math.sqrt(ratio / wanted)", "-temperature_for(ratio, wanted)"),
    "sampling/top-k-top-p": ("top_k_top_p(logits, k + 1, p)", "top_k_top_p(logits, k, 1 - p)", "logits"),
    "sampling/penalty": ("logits", "penalise(logits, ~written, theta)", "logits.masked_fill(written, -torch.inf)"),
    "sampling/shift": ("logits", "penalise_log_p(logits, ~written, theta)", "penalise_log_p(-logits, written, theta)"),
    "sampling/shown": ("shown(text, stops[:1])", "text[:-1]", "''"),
    "speculation/choose-k": (
        "0",
        "len(histogram) - 1",
        "choose_k(histogram[::-1], guess_cost, pass_cost)",
        "choose_k(histogram, 2 * guess_cost, pass_cost)",
    ),
    "speculation/verifier": (
        "verifier(logits, draft_logits, guesses, [1 - one for one in uniforms], top_p, held)",
        "verifier(logits, draft_logits, guesses, uniforms, 1.0, held)",
        "verifier(logits, draft_logits, guesses, uniforms, top_p, held)[1:]",
    ),
    "speculation/scheduler": (
        "scheduled(q, p, checked)",
        "scheduled(p, q, [not one for one in checked])",
        "scheduled(p, q, [True] * len(checked))[::-1]",
    ),
    "speculation/mixture": (
        "1",
        "pays_from(num_experts, top_k, used, routed, guess, a) - 1",
        "pays_from(num_experts, top_k, used, routed, 2 * guess, a)",
        "pays_from(num_experts, 2 * top_k, used, routed, guess, a)",
        "pays_from(num_experts, top_k, used, routed, guess, 1 - a)",
    ),
    "speed/decode-floor": ("decode_floor_ms(0, bits_per_weight, kv_bytes_per_token, context, bandwidth_gb_s)",),
    "speed/batch": ("rates(batch + 1, step_seconds)",),
    "speed/timing": ("events[2][1] - events[1][1]",),
    "training/scale": ("[scale, *scale_course(scale, interval, overflows)[:-1]]",),
    "training/clip": (
        "[g * scale for g in prepare(gradient, scale, max_norm)]",
        "[g / scale * min(1, max_norm / sum(abs(x / scale) for x in gradient)) for g in gradient]",
    ),
    "training/accumulate": ("batch_gradient(parts[:1])", "max(sum(part) / len(part) for part in parts)"),
    "training/warm-up": (
        "learning_rate(step + 1, steps, rise, peak)",
        "peak * (step + 1) / rise if step < rise else peak * (1 - 0.9 * (step - rise) / (steps - 1 - rise))",
    ),
    "upcycling/rules": (
        "survivors(rules, copies, slices)[:1]",
        "survivors(rules, slices, copies)",
        "[n for n, rule in enumerate(rules) if rule['renormalise']]",
    ),
    "upcycling/slice-weights": (
        "slice_weights(x, -rows, top_k, slices)",
        "slice_weights(x, rows, 1, slices)",
        "(slice_weights(x, rows, top_k, slices) > 0) / top_k",
    ),
    "upcycling/gate": (
        "failing(after, before, limit)",
        "failing(before, after, 2 * limit + 0.05)",
        "_failing(before, after, limit, width=2 * before.shape[1] ** 0.5)",
    ),
    "upcycling/split": (
        "split_swiglu(gate_up, down, order.flip(0), slices)",
        "split_swiglu(gate_up.roll(len(order), 0), down, order, slices)",
        "split_swiglu(gate_up, down, order, 1)",
    ),
    "whole/beyond": (
        "2 * beyond(token, document, sources, chosen, orders, at_least)",
        "beyond(token, document, sources, chosen[:, :1], orders[:1], at_least)",
    ),
    "whole/chain": ("chain(rows, depth).transpose(0, 1)", "chain(rows, depth).flip(0) + 1"),
    "whole/crossing": ("crossing(tokens, bits, 2 * line)", "tokens[-1]", "np.interp(-line, -np.array(bits), tokens)"),
    "your_machine/decode-floor": ("parameters * bytes_per_weight / bandwidth * 1e6",),
    "your_machine/which-bound": (
        "'compute' if 2 * m * k * n / flops >= bytes_per_number * (k * n + m * n) / bandwidth else 'bandwidth'",
        "which_bound(m, k, n, bytes_per_number, bandwidth, flops).title()",
    ),
}
# An argument that is there to mislead; an answer that leaves out any other one is wrong.
MISLEADING = {"published/latent-elements": {"heads"}}
TOOLS = {"np": np, "torch": torch, "math": math, "itertools": itertools, "Fraction": Fraction, "Sampling": Sampling}
TOOLS |= {"TopKLogitsWarper": TopKLogitsWarper, "TopPLogitsWarper": TopPLogitsWarper, "re": re}


def alone(q, k, v, real):
    """One padded row of the exercise on padding: its tokens without the padding, a query at a time, by hand."""
    place = [n for n, there in enumerate(real.tolist()) if there]
    theta = 1e5 ** (-np.arange(0, 8, 2) / 8)

    def turned(x, n):  # a pair is one complex number
        a, b = np.split(x.numpy(), 2)
        return (a + 1j * b) * np.exp(1j * n * theta)

    out = []
    for i, one in enumerate(q, start=len(real) - len(q)):
        before = [n for n in place if n <= i] if i in place else []
        own = turned(one, len(before) - 1)
        scores = [(own * turned(k[n], m).conj()).real.sum() / 8**0.5 for m, n in enumerate(before)]
        weights = np.exp(scores) / np.exp(scores).sum()
        out.append(sum((w * v[n].numpy() for w, n in zip(weights, before, strict=True)), np.zeros(8)).tolist())
    return out


TOOLS["alone"] = alone


def keeps_all(slots, window, steps):
    """The exercise on slots, played: whether every token finds the keys of its window in a ring of so many slots."""
    ring, length = {}, 0
    for step in steps:
        for at in range(length, length + step):
            ring[at % slots] = at
            if any(ring[n % slots] != n for n in range(max(0, at - window + 1), at)):
                return False
        length += step
    return True


TOOLS["keeps_all"] = keeps_all


def library_block(x, w, head_dim, dtype):
    """The exercise's block as `dslib` has it, with these weights."""
    heads, kv_heads = (len(w[name]) // head_dim for name in "qk")
    config = DecoderConfig(
        2, x.shape[1], len(w["gate"]), 1, heads, kv_heads, head_dim=head_dim, rope_theta=1e5, qk_norm=True
    )
    module = Block(config, Attention(config), SwiGLU(config.hidden_size, config.intermediate_size)).to(dtype)
    names = {
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
        "self_attn.o_proj": "o",
        "mlp.down_proj": "down",
    }
    state = {f"{theirs}.weight": w[ours] for theirs, ours in names.items()}
    state |= {f"{name}.weight": w[name] for name in ("input_layernorm", "post_attention_layernorm")}
    state["self_attn.qkv_proj.weight"] = torch.cat([w[name] for name in "qkv"])
    state["mlp.gate_up_proj.weight"] = torch.cat((w["gate"], w["up"]))
    module.load_state_dict(state)
    at = torch.arange(len(x))[None]
    with torch.no_grad():
        return module(x[None].to(dtype), rope_angles(at, head_dim, 1e5, dtype=dtype), Step(at, causal=True), None, 0)[0]


TOOLS["library_block"] = library_block
TOOLS["one_query"] = lambda q, k, v: (k @ q / len(q) ** 0.5).softmax(0) @ v
TOOLS["turned_number"] = lambda head, p, base, i: (  # of one number and its neighbour
    head[i] * math.cos(angle := p * base ** (-(i - i % 2) / len(head)))
    + (2 * (i % 2) - 1) * head[i ^ 1] * math.sin(angle)
)
TOOLS["unless_none"] = lambda value, then: None if value is None else then(value)
ARRAYS = {
    "array": np.array, "tensor": torch.tensor, "doubles": lambda value: torch.tensor(value, dtype=torch.float64),
}  # fmt: skip
# The same answer in another form, for a number, for a list of them, and for a tensor.
NUMBERS = ARRAYS | {"float": float, "Fraction": Fraction, "Decimal": Decimal, "float32": np.float32}
LISTS = ARRAYS | {"tuple": tuple, "list": list, "fractions": lambda value: [Fraction(one) for one in value]}
TENSORS = {
    "lists": Tensor.tolist, "array": Tensor.numpy, "doubles": Tensor.double, "rows": lambda value: value.unbind(),
}  # fmt: skip
# Another answer, whatever the right one is: one off, twice as much, turned round, of another shape, not a number.
OTHER_NUMBERS = {
    "one more": lambda x: x + 1, "twice": lambda x: 2 * x, "less": lambda x: -x, "almost": lambda x: x * 1.002,
    "text": str, "listed": lambda x: [x], "inverse": lambda x: 1 / x if x else 7, "true": bool,
}  # fmt: skip
OTHER_LISTS = {
    "backwards": lambda x: x[::-1], "short": lambda x: x[:-1], "long": lambda x: [*x, x[-1]], "first": lambda x: x[0],
    "sum": sum, "set": set, "iterator": iter, "text": str, "column": lambda x: [[one] for one in x],
    "one more": lambda x: [one + 1 for one in x], "almost": lambda x: [one * 1.01 for one in x],
}  # fmt: skip
OTHER_TENSORS = {
    "one more": lambda x: x + 1, "twice": lambda x: 2 * x, "less": lambda x: -x, "almost": lambda x: x * 1.001,
    "mirrored": lambda x: x.flip(-1), "short": lambda x: x[:-1], "deeper": lambda x: x[None], "bool": Tensor.bool,
    "zeros": torch.zeros_like,
}  # fmt: skip


def as_kind(value, number, several, tensor):
    """What a table has for a value of this kind; nothing for text."""
    if isinstance(value, Tensor):
        return tensor
    return number if isinstance(value, int | float) else several if isinstance(value, list | tuple) else {}


def changed(exercise, change, argument=None, value=None):
    """The reference with its result changed, or with one argument always the same."""
    names = list(inspect.signature(exercise.reference).parameters)

    def fn(*given, **named):
        given = dict(zip(names, given, strict=False)) | named
        result = exercise.reference(**given | ({argument: value} if argument else {}))
        return result if result is None else change(result)

    return fn


def parameters(table):
    return [(name, text) for name, texts in table.items() for text in ([texts] if isinstance(texts, str) else texts)]


@pytest.mark.parametrize("name", ALL)
def test_the_reference_passes_and_stubs_are_not_done_yet(name):
    exercise = ALL[name]
    assert exercises.check(name, exercise.reference).passed
    assert exercise.mistakes, "an exercise needs at least one known mistake"
    assert exercises.check(name, lambda *_, **__: None).status == "todo"
    report = exercises.check(name, exercise.answer("[None, print(end='')][0]"))
    assert report.status == "wrong" and "is `return` missing?" in report.message


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_each_mistake_gets_its_own_hint(name, wrong, hint):
    report = exercises.check(name, wrong)
    assert (report.status, report.message) == ("mistake", hint), str(report)


@pytest.mark.parametrize(("name", "expression"), parameters(RIGHT))
def test_a_right_answer_found_in_another_way_passes(name, expression):
    report = exercises.check(name, ALL[name].answer(expression, **TOOLS))
    assert report.passed, str(report)


def said(report):
    """A rejection has a hint, and shows how the answer differs."""
    yours, wanted = (line.partition(": ")[2] for line in (*report.details, "", "", "")[1:3])
    return report.status == "mistake" or (report.status == "wrong" and report.message and yours != wanted)


@pytest.mark.parametrize(("name", "expression"), parameters(WRONG))
def test_another_wrong_answer_is_rejected_and_the_difference_in_sight(name, expression):
    assert said(exercises.check(name, ALL[name].answer(expression, **TOOLS)))


@pytest.mark.parametrize("name", ALL)
def test_forms_do_not_matter_but_values_shapes_and_arguments_do(name):
    exercise = ALL[name]
    cases = [
        case if isinstance(case, dict) else dict(zip(arguments(name), case, strict=True)) for case in exercise.cases
    ]
    result = exercise.reference(**copy.deepcopy(cases[0]))
    for form, change in as_kind(result, NUMBERS, LISTS, TENSORS).items():
        assert exercises.check(name, changed(exercise, change)).passed, form
    for form, change in as_kind(result, OTHER_NUMBERS, OTHER_LISTS, OTHER_TENSORS).items():
        assert said(exercises.check(name, changed(exercise, change))), form
    for argument, case in itertools.product(set(arguments(name)) - MISLEADING.get(name, set()), cases):
        assert not exercises.check(name, changed(exercise, lambda x: x, argument, case[argument])).passed, argument


def arguments(name):
    return list(inspect.signature(ALL[name].reference).parameters)


def test_every_exercise_has_further_wrong_answers_and_the_name_of_its_chapter():
    assert len(ALL) == len(list(exercises.all_exercises()))
    assert list(WRONG) == list(ALL)
    assert {name.partition("/")[0] for name in ALL} == set(exercises.chapters())


@pytest.fixture
def one(monkeypatch):
    """Replace the search, so that the checker can be tried on an exercise made up on the spot."""

    def place(reference, cases, **rest):
        exercise = Exercise("made/up", cases, reference, **rest)
        monkeypatch.setattr(exercises, "find", lambda name: exercise)
        return lambda fn: exercises.check("made/up", fn)

    return place


@pytest.mark.parametrize(
    ("name", "words"),
    [("your_machine/decode-flor", "your_machine/decode-floor"), ("nowhere", "got 'nowhere'"), (None, "got None")],
)
def test_unknown_names_bring_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        exercises.check(name, lambda: 0)


def not_written(x):
    """Still to do."""
    raise NotImplementedError("your turn")


def kernel_missing(x):
    return torch.ones(2, dtype=torch.bool) @ torch.ones(2, dtype=torch.bool) if x else not_written(x)


@pytest.mark.parametrize(
    ("fn", "status", "words"),
    [
        (lambda x: None, "todo", "Replace the stub"),
        (lambda x: ..., "todo", "Replace the stub"),
        (not_written, "todo", "Replace the stub"),
        (lambda x: not_written(x), "error", "NotImplementedError: your turn"),
        (kernel_missing, "error", "Error: "),
        (lambda x: 1 / (x - x), "error", "ZeroDivisionError"),
        (lambda: 1, "error", "TypeError"),
        (3, "error", "without calling it"),
        (lambda x: x, "wrong", "Square it."),
        (lambda x: [x * x][1:] or None, "wrong", "is `return` missing?"),
        (lambda x: x * x if x < 3 else None, "wrong", "is `return` missing?"),
        (lambda x: -x, "mistake", "sign"),
        (lambda x: -x if x == 1 else 7, "wrong", "Square it."),  # a mistake on only some cases is not that mistake
        (lambda x: 1 / x, "wrong", "Square it."),
    ],
)
def test_what_is_said(one, fn, status, words):
    mistakes = "-x\n    sign\n1 / (x - 1)\n    cannot run, so it is nobody's answer"
    report = one(lambda x: x * x, [{"x": 1}, {"x": 3}], mistakes=mistakes, hint="Square it.")(fn)
    assert report.status == status and words in report.message


@pytest.mark.parametrize(
    ("want", "got", "place"),
    [
        ([1, [2, 3]], [1, [2, 4]], "[1, 1]: yours 4, wanted 3"),
        ([1, 2], [1, 2, 3], "length: yours 3, wanted 2"),
        ([[1], [2]], [[1], 2], "[1]: kind: yours int, wanted list"),
        ({"a": 1}, {"a": 2}, "['a']: yours 2, wanted 1"),
        ([1, 2], iter([1, 2]), "kind: yours list_iterator, wanted list"),
        (1, True, "kind: yours bool, wanted int"),
        ({"a": 1}, {"b": 1}, "keys: yours ['b'], wanted ['a']"),
        (torch.ones(2, 3), torch.ones(3, 2), "shape: yours (3, 2), wanted (2, 3)"),
        (torch.ones(2), torch.ones(1, 2), "shape: yours (1, 2), wanted (2,)"),  # would broadcast
        (torch.ones(1), 1.0, "shape: yours (), wanted (1,)"),
        (torch.arange(200), torch.arange(200).clamp(max=198), "[199]: yours 198, wanted 199"),
        (["a" * 200 + "b"], ["a" * 200 + "c"], "ac'"),
        ([1, 2], torch.ones(2).to_sparse(), "kind: yours Tensor, wanted list"),  # its numbers cannot be listed
    ],
)
def test_the_first_difference_is_named(one, want, got, place):
    report = one(lambda: want, [()])(lambda: got)
    assert report.details[3].startswith("first difference: ") and place in report.details[3]
    assert report.details[1].partition(": ")[2] != report.details[2].partition(": ")[2]
    assert max(map(len, report.details)) < 300


def test_an_error_shows_the_case(one):
    assert one(lambda x, y: x, [(1, 0)])(lambda x, y: x / y).details == ("case: 1, 0",)


def test_the_arguments_are_the_callers(one):
    def spoils(values):
        values.clear()
        return 6

    check = one(lambda values: sum(values), [([1, 2, 3],)])
    report = check(spoils)
    assert report.status == "mistake" and "`values` is changed" in report.message
    assert check(sum).passed, "every call has arguments of its own"


@pytest.mark.parametrize(
    ("want", "right", "wrong"),
    [
        (3, 3.0, 4),
        (10**9, 1e9, 1e9 + 1),  # a tolerance of a millionth does not hide one more
        (0.5, 0.5 + 1e-9, 0.5001),
        (0.0, 1e-9, 1e-3),
        (-2.8e-17, 0.0, 1e-3),
        (float("inf"), float("inf"), 1.0),
        (float("nan"), float("nan"), 0.0),
        (True, True, 1),
        (1, 1, True),
        (1.0, Decimal("1.0"), 10**400),
        (0.25, Fraction(1, 4), 0.25j),
        (0.5, Decimal("0.5"), Decimal("sNaN")),
        ("compute", np.str_("compute"), "Compute"),
        ([1, 2], (1, 2), {1, 2}),
        ([0, 1, 2], range(3), "012"),
        ([1, 2], torch.tensor([1, 2]), [1, 2, 3]),
        ({"a": 1}, {"a": 1.0}, {"b": 1}),
        (10**15, 10**15, 10**15 + 1),
        (3, 3, "3"),
        (2.0, torch.tensor(2.0), torch.tensor([2.0])),
        (2.0, np.float32(2.0), None),
        (True, torch.tensor(True), torch.tensor(1)),
        (True, np.bool_(True), np.bool_(False)),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6]), torch.tensor([1.0, 2.1])),
        (torch.tensor([1.0, 2.0]), np.array([1, 2]), [1.0, "2"]),
        (torch.tensor([1000.0, 0.0]), [Fraction(1000), 1e-4], torch.tensor([1000.0, 1e-2])),
        (torch.tensor([[1, 2]]), [[1, 2]], [1, 2]),
    ],
)
def test_equality(one, want, right, wrong):
    check = one(lambda: want, [()])
    assert check(lambda: right).passed
    assert not check(lambda: wrong).passed


def test_reports_say_it_in_words_and_symbols(one):
    report = one(lambda x: x, [("<b>",)])(lambda x: "<i>")
    assert str(report).startswith("✗ Not yet: made/up") and "<i>" in str(report)
    assert "<i>" not in report._repr_html_() and "exercise-wrong" in report._repr_html_()


def test_importing_it_loads_no_torch():
    code = "import sys, measured.exercises; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
