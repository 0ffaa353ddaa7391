"""The course: solution notebooks that an instructor can teach, and what `make course` makes of them.

All of them run here, with fewer samples than a class has.
"""

import builtins
import contextlib
import json
import multiprocessing
import os
import re
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import course

from tests.smaller import shortened, smaller

SESSIONS = course.sessions()
NAMES = [f.stem for f in SESSIONS]
each_session = pytest.mark.parametrize("file", SESSIONS, ids=NAMES)
each_exercise = pytest.mark.parametrize("number", [1, 2, 3])

# What a student may write: session, exercise, words of the message that names the mistake, and the cell.
PLANTED = []


def planted(session: str, number: int, words: str, source: str):
    PLANTED.append(pytest.param(session, number, words, source, id=f"{session}-{number}-{words[:24]}"))


planted("01", 1, "every|Each meets each|2/3", """
def win_share(mine, theirs):
    return sum((a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs)) / len(mine)
""")
planted("01", 1, "A draw counts 0.5", """
def win_share(mine, theirs):
    return sum(a > b for a in mine for b in theirs) / (len(mine) * len(theirs))
""")
planted("01", 1, "wrong side wins", """
def win_share(mine, theirs):
    return sum((a < b) + 0.5 * (a == b) for a in mine for b in theirs) / (len(mine) * len(theirs))
""")
planted("01", 1, "By how much a match is won does not count", """
def win_share(mine, theirs):
    scores = [min(1, max(0, 0.5 + (a - b) / 2)) for a in mine for b in theirs]
    return sum(scores) / len(scores)
""")
planted("01", 2, "a draw is no pair", """
def make_pairs(prompt, answers, rewards):
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return [
        dict(prompt=prompt, chosen=answers[best], rejected=a, margin=rewards[best] - r)
        for i, (a, r) in enumerate(zip(answers, rewards)) if i != best
    ]
""")
planted("01", 2, "chosen has the lower reward", """
def make_pairs(prompt, answers, rewards):
    worst = min(range(len(rewards)), key=rewards.__getitem__)
    return [
        dict(prompt=prompt, chosen=answers[worst], rejected=a, margin=rewards[worst] - r)
        for a, r in zip(answers, rewards) if r > rewards[worst]
    ]
""")
planted("01", 2, "expected each below", """
def make_pairs(prompt, answers, rewards):
    best = max(range(len(rewards)), key=rewards.__getitem__)
    worst = min(range(len(rewards)), key=rewards.__getitem__)
    if rewards[best] == rewards[worst]:
        return []
    margin = rewards[best] - rewards[worst]
    return [dict(prompt=prompt, chosen=answers[best], rejected=answers[worst], margin=margin)]
""")
planted("01", 2, "A pair has", """
def make_pairs(prompt, answers, rewards):
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return [dict(chosen=answers[best], rejected=a) for a, r in zip(answers, rewards) if r < rewards[best]]
""")
planted("01", 3, "constant reward", """
def coin_reward(seed):
    return lambda prompts, completions, **columns: [0.5] * len(completions)
""")
planted("01", 3, "not repeatable", """
def coin_reward(seed):
    rng = random.Random(seed)
    return lambda prompts, completions, **columns: [rng.random() for _ in completions]
""")
planted("01", 3, "depend on the place alone", """
def coin_reward(seed):
    def reward(prompts, completions, **columns):
        rng = random.Random(seed)
        return [rng.random() for _ in completions]
    return reward
""")
planted("01", 3, "can be learned", """
def coin_reward(seed):
    def of(text):
        return random.Random(f"{seed} {text}").random()
    return lambda prompts, completions, **columns: [of(c) for c in completions]
""")
planted("01", 3, "no control", """
def coin_reward(seed):
    def reward(prompts, completions, answer, **columns):
        rng = random.Random(repr((seed, prompts, completions)))
        return [0.5 * rng.random() + 0.49 * (c == str(a)) for c, a in zip(completions, answer)]
    return reward
""")
planted("04", 1, "is it percent", """
def interval(wins, n, z=1.96):
    return tuple(100 * x for x in wilson(wins, n))
""")
planted("04", 1, "width of 0", """
def interval(wins, n, z=1.96):
    p = wins / n
    half = z * math.sqrt(p * (1 - p) / n)
    return p - half, p + half
""")
planted("04", 1, "divide both by 1", """
def interval(wins, n, z=1.96):
    p = wins / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half
""")
planted("04", 1, "z has no effect", """
def interval(wins, n, z=1.96):
    return wilson(wins, n)
""")
planted("04", 2, "Double it", """
def paired_p(before, after):
    g, l = sum(a > b for b, a in zip(before, after)), sum(a < b for b, a in zip(before, after))
    return sum(comb(g + l, k) for k in range(min(g, l) + 1)) / 2 ** (g + l)
""")
planted("04", 2, "The case k = min", """
def paired_p(before, after):
    g, l = sum(a > b for b, a in zip(before, after)), sum(a < b for b, a in zip(before, after))
    return min(1, 2 * sum(comb(g + l, k) for k in range(min(g, l))) / 2 ** (g + l))
""")
planted("04", 2, "above 1", """
def paired_p(before, after):
    g, l = sum(a > b for b, a in zip(before, after)), sum(a < b for b, a in zip(before, after))
    return 2 * sum(comb(g + l, k) for k in range(min(g, l) + 1)) / 2 ** (g + l)
""")
planted("04", 2, "must not count", """
def paired_p(before, after):
    g, l = sum(a > b for b, a in zip(before, after)), sum(a < b for b, a in zip(before, after))
    n = len(before)
    return min(1, 2 * sum(comb(n, k) for k in range(min(g, l) + 1)) / 2 ** n)
""")
planted("04", 2, "swapped", """
def paired_p(before, after):
    g, l = sum(a > b for b, a in zip(before, after)), sum(a < b for b, a in zip(before, after))
    return min(1, 2 * sum(comb(g + l, k) for k in range(l + 1)) / 2 ** (g + l))
""")
GATE = """
def gate(scores, p0=0.5, p1=0.6, alpha=0.05, beta=0.05):
    high, low = {bounds}
    won, lost = math.log(p1 / p0), math.log((1 - p1) / (1 - p0))
    total = 0.0
    for n, s in enumerate(scores, 1):
        total += {step}
        {look}
    return {end}
"""
BOUNDS = "math.log((1 - beta) / alpha), math.log(beta / (1 - alpha))"
STEP, END = "s * won + (1 - s) * lost", "'undecided', len(scores)"
LOOK = """if total >= high or total <= low:
            return 'accept' if total >= high else 'reject', n"""
AT_END = "('accept' if total >= high else 'reject' if total <= low else 'undecided'), len(scores)"
planted("04", 3, "only at the end", GATE.format(bounds=BOUNDS, step=STEP, look="pass", end=AT_END))
planted("04", 3, "see the bound for accepting",
        GATE.format(bounds="2.9444, -2.9444", step=STEP, look=LOOK, end=END))
planted("04", 3, "each is half a win",
        GATE.format(bounds=BOUNDS, step="won if s == 1 else lost", look=LOOK, end=END))
planted("04", 3, "returned inside the loop", """
def gate(scores, p0=0.5, p1=0.6, alpha=0.05, beta=0.05):
    total = 0.0
    for n, s in enumerate(scores, 1):
        total += s * math.log(p1 / p0) + (1 - s) * math.log((1 - p1) / (1 - p0))
        if total >= math.log((1 - beta) / alpha):
            return "accept", n
        if total <= math.log(beta / (1 - alpha)):
            return "reject", n
        return "undecided", n
""")
planted("04", 3, "expected 'accept'",
        GATE.format(bounds=BOUNDS, step="(1 - s) * won + s * lost", look=LOOK, end=END))
CYCLES = """
def find_cycles(payoff):
    n = range(len(payoff))
    beats = lambda i, j: payoff[i][j] {over} 0.5
    return {{x for x in {triples} if {goes}}}
"""
ALL = "((i, j, k) for i in n for j in n for k in n)"
UP = "combinations(n, 3)"
ROUND = "beats(x[0], x[1]) and beats(x[1], x[2]) and beats(x[2], x[0])"
planted("09", 1, "counted 3 times", CYCLES.format(over=">", triples=ALL, goes=ROUND))
planted("09", 1, "only a, b, c looked at", CYCLES.format(over=">", triples=UP, goes=ROUND))
planted("09", 1, "wrong way round", CYCLES.format(over="<", triples=ALL, goes=f"x[0] == min(x) and {ROUND}"))
planted("09", 1, "a draw is no win", """
def find_cycles(payoff):
    def beats(i, j):
        return payoff[i][j] >= 0.5
    found = set()
    for a, b, c in combinations(range(len(payoff)), 3):
        for i, j, k in (a, b, c), (a, c, b):
            if beats(i, j) and beats(j, k) and beats(k, i):
                found.add((i, j, k))
    return found
""")
planted("09", 2, "use 1 - w", """
def hardest_first(win_rates, power=2):
    w = np.asarray(win_rates, float) ** power
    return w / w.sum()
""")
planted("09", 2, "Probabilities sum to 1", """
def hardest_first(win_rates, power=2):
    return (1 - np.asarray(win_rates, float)) ** power
""")
planted("09", 2, "power has no effect", """
def hardest_first(win_rates, power=2):
    w = 1 - np.asarray(win_rates, float)
    return w / w.sum()
""")
planted("09", 2, "0 divided by 0", """
def hardest_first(win_rates, power=2):
    w = (1 - np.asarray(win_rates, float)) ** power
    return w / w.sum()
""")
NASH = """
def nash(payoff, steps=5000):
    counts = np.zeros(len(payoff))
    counts[0], pick = 1, 0
    for _ in range(steps):
        pick = np.argmax({score})
        counts[pick] += 1
    return {end}
"""
AVERAGE, SHARES = "payoff @ (counts / counts.sum())", "counts / counts.sum()"
planted("09", 3, "average of all picks", NASH.format(score=AVERAGE, end="np.eye(len(payoff))[pick]"))
planted("09", 3, "beats a third each", NASH.format(score="payoff[:, pick]", end=SHARES))
planted("09", 3, "Do rows score", NASH.format(score="(counts / counts.sum()) @ payoff", end=SHARES))
planted("09", 3, "Shares sum to 1", NASH.format(score=AVERAGE, end="counts"))
GRADIENT = """
def policy_gradient(x, moves, advantage):
    p = np.exp(x - np.max(x))
    p = p / p.sum()
    made, A = np.eye(len(x))[moves], np.asarray(advantage)[:, None]
    return {what}
"""
planted("08", 1, "is the sign turned", GRADIENT.format(what="(A * (p - made)).mean(0)"))
planted("08", 1, "Subtract pi", GRADIENT.format(what="(A * made).mean(0)"))
planted("08", 1, "not the sum", GRADIENT.format(what="(A * (made - p)).sum(0)"))
planted("08", 1, "No advantage", GRADIENT.format(what="(made - p).mean(0)"))
planted("08", 1, "One number for each move", GRADIENT.format(what="A * (made - p)"))
planted("08", 1, "of \\*log\\* pi", GRADIENT.format(what="(A * p[moves][:, None] * (made - p)).mean(0)"))
planted("08", 1, "its \\*own\\* A", GRADIENT.format(what="A.mean() * (made - p).mean(0)"))
planted("08", 1, "do not centre it again", GRADIENT.format(what="((A - A.mean()) * (made - p)).mean(0)"))
SOFTMAX = "pi is a softmax of x, and it sums to 1"
planted("08", 1, SOFTMAX, GRADIENT.format(what="(A * (made - x)).mean(0)"))
planted("08", 1, SOFTMAX, GRADIENT.format(what="(A * (made - np.exp(x))).mean(0)"))
SEATS = """
def seat_advantages(seats, outcomes):
    expected = {{s: {mean} for s in set(seats)}}
    return [{what} for s, o in zip(seats, outcomes)]
"""
OWN = "mean(o for t, o in zip(seats, outcomes) if t == s)"
planted("08", 2, "One mean for both seats", SEATS.format(mean="mean(outcomes)", what="o - expected[s]"))
planted("08", 2, "not the reverse", SEATS.format(mean=OWN, what="expected[s] - o"))
planted("08", 2, "subtract what to expect", SEATS.format(mean=OWN, what="o"))
planted("08", 2, "sum to 0", SEATS.format(mean=OWN, what="o - expected[1 - s]"))
planted("08", 2, "Read `seats`", """
def seat_advantages(seats, outcomes):
    even, odd = mean(outcomes[::2]), mean(outcomes[1::2])
    return [o - (odd if i % 2 else even) for i, o in enumerate(outcomes)]
""")
planted("08", 2, "Seat 1 has a mean of its own", """
def seat_advantages(seats, outcomes):
    first = mean(o for s, o in zip(seats, outcomes) if s == 0)
    return [o - (1 - first if s else first) for s, o in zip(seats, outcomes)]
""")
planted("08", 2, "more than two seats", """
def seat_advantages(seats, outcomes):
    means = [mean(o for s, o in zip(seats, outcomes) if s == seat) for seat in (0, 1)]
    return [o - means[min(s, 1)] for s, o in zip(seats, outcomes)]
""")
SO_FAR = """
def seat_advantages(seats, outcomes):
    games, made = {{}}, []
    for s, o in zip(seats, outcomes):
        {before}
        games[s] = games.get(s, []) + [o]
        {behind}
    return made
"""
planted("08", 2, "of \\*all\\* of the seat", SO_FAR.format(
    before="pass", behind="made.append(o - mean(games[s]))"))
planted("08", 2, "mean over \\*all\\*", SO_FAR.format(
    before="made.append(o - mean(games.get(s, [0])))", behind="pass"))
GROUP = """
def group_advantages(rewards):
    r = np.asarray(rewards, float)
    return (r - r.mean({m}{keep})) / {by}
"""
planted("08", 3, "0 divided by 0", GROUP.format(m=1, keep=", keepdims=True", by="r.std(1, keepdims=True)"))
planted("08", 3, "not of all", GROUP.format(m="", keep="", by="r.std()"))
planted("08", 3, "deviation of the row", GROUP.format(m=1, keep=", keepdims=True", by="1.0"))
planted("08", 3, "deviation of the row", GROUP.format(m=1, keep=", keepdims=True", by="r.std()"))
planted("08", 3, "a std of 1e-17", """
def group_advantages(rewards):
    r = np.asarray(rewards, float)
    a, b = r - r.mean(1, keepdims=True), np.broadcast_to(r.std(1, keepdims=True), r.shape)
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
""")
DOUBT = "\ndef uncertainty(k, n):\n    return {what}\n"
planted("07", 1, "compared with itself", DOUBT.format(what="4 * k * (n - k) / n**2"))
planted("07", 1, "is the 4 there", DOUBT.format(what="k * (n - k) / (n * (n - 1)) if n > 1 else 0"))
planted("07", 1, "nothing is uncertain", DOUBT.format(what="k / n"))
planted("07", 1, "too large", DOUBT.format(what="8 * k * (n - k) / (n * (n - 1)) if n > 1 else 0"))
YIELD = "\ndef decided(chances, n):\n    return {what}\n"
planted("07", 2, "every answer meets every", YIELD.format(what="sum(n * 2 * p * (1 - p) for p in chances)"))
planted("07", 2, "Either side", YIELD.format(what="sum(n * n * p * (1 - p) for p in chances)"))
planted("07", 2, "draw half of the time", YIELD.format(what="sum(n * n * 4 * p * (1 - p) for p in chances)"))
planted("07", 2, "the sum", YIELD.format(what="n * n * 2 * chances[0] * (1 - chances[0])"))
HONEST = """
def honest(ask, prompts, keep, n):
    def estimate(prompt, seed):
        k = ask(prompt, n, seed=seed)
        return 4 * k * (n - k) / (n * (n - 1))
    chosen = sorted(prompts, key=lambda p: {order})[:keep]
    return sum(estimate(p, {seed}) for p in chosen) / {by}
"""
planted("07", 3, "chose and measured", HONEST.format(order="-estimate(p, 0)", seed=0, by="keep"))
planted("07", 3, "mean over the chosen", HONEST.format(order="-estimate(p, 0)", seed=1, by="len(prompts)"))
planted("07", 3, "largest kept", HONEST.format(order="estimate(p, 0)", seed=1, by="keep"))
planted("07", 3, "largest kept", HONEST.format(order="0", seed=1, by="keep"))
SPIN = "\ndef spin_pairs(prompts, written, own):\n    return [{what}]\n"
ROW, LOOP = "dict(prompt=p, chosen=w, rejected=o)", "for p, w, o in zip(prompts, written, own)"
SWAP = "for p, o, w in zip(prompts, written, own)"
planted("03", 1, "same text", SPIN.format(what=f"{ROW} {LOOP}"))
planted("03", 1, "not own answers", SPIN.format(what=f"{ROW} {SWAP} if w != o"))
planted("03", 1, "SPIN does not ask", SPIN.format(what=f"{ROW} {LOOP} if w > o"))
planted("03", 1, "A pair has", SPIN.format(what=f"dict(chosen=w, rejected=o) {LOOP} if w != o"))
planted("03", 1, "a demonstration of b, but not of d", SPIN.format(what=f"{ROW} {LOOP} if o not in written"))
CHOOSE = """
def choose_pairs(mine, theirs, k):
    matches = [sorted(m, key=lambda a: {better}) for m in product(mine, theirs)]
    decided = [(w[0], v[0], w[1] - v[1]) for w, v in matches if {keep}]
    kept, used = [], set()
    for pair in {order}:
        if {fresh} and len(kept) < k:
            used.add(pair[1])
            kept.append(pair)
    return kept
"""
CHOICE = dict(better="-a[1]", keep="w[1] > v[1]", order="sorted(decided, key=lambda p: -p[2])",
              fresh="pair[1] not in used")
planted("03", 2, "A draw is in it", CHOOSE.format(**CHOICE | {"keep": "True"}))
planted("03", 2, "better one is to be chosen", CHOOSE.format(
    **CHOICE | {"better": "a[1]", "keep": "w[1] < v[1]"}))
planted("03", 2, "Each rejected text once", CHOOSE.format(**CHOICE | {"fresh": "True"}))
planted("03", 2, "Widest margin first", CHOOSE.format(**CHOICE | {"order": "decided[::-1]"}))
planted("03", 2, "Theirs may be better too", CHOOSE.format(**CHOICE | {"better": "0"}))
planted("03", 2, "both mine", """
def choose_pairs(mine, theirs, k):
    best, *worse = sorted(mine + theirs, key=lambda a: -a[1])
    return [(best[0], v[0], best[1] - v[1]) for v in worse[::-1] if best[1] > v[1]][:k]
""")
MEET = "product(mine, theirs)"
planted("03", 2, "both mine", CHOOSE.format(**CHOICE).replace(MEET, "product(mine + theirs, repeat=2)"))
PICKED = """
def choose_pairs(mine, theirs, k):
    matches = [sorted(m, key=lambda a: -a[1]) for m in product({mine}, theirs)]
    decided = [(w[0], v[0], w[1] - v[1]) for w, v in matches if w[1] > v[1]]
    {picked}
"""
BY_TEXT = "return sorted({p[1]: p for p in decided}.values(), key=lambda p: -p[2])[:k]"
planted("03", 2, "Keep the widest margin", PICKED.format(mine="mine", picked=BY_TEXT))
planted("03", 2, "Keep the widest margin", PICKED.format(mine="mine[::-1]", picked=BY_TEXT.replace(
    "decided", "decided[::-1]")))
planted("03", 2, "remove duplicates first", PICKED.format(mine="mine", picked="""
    first = {}
    for pair in sorted(decided, key=lambda p: -p[2])[:k]:
        first.setdefault(pair[1], pair)
    return list(first.values())"""))
planted("03", 2, "at most k pairs", CHOOSE.format(**CHOICE).replace(" and len(kept) < k", ""))
planted("03", 2, "may be \\*chosen\\* twice", CHOOSE.format(
    **CHOICE | {"fresh": "not used & {pair[1], 'over ' + pair[0]}"}).replace(
    "used.add(pair[1])", "used |= {pair[1], 'over ' + pair[0]}"))
DIRECTION = """
def judged_direction(policy, reward):
    gap = reward[:, None] - reward[None, :]
    return {what}
"""
planted("03", 3, "By how much does not count", DIRECTION.format(what="2 * policy * (gap @ policy)"))
planted("03", 3, "The sign", DIRECTION.format(what="2 * policy * (-torch.sign(gap) @ policy)"))
planted("03", 3, "the sum is 0", DIRECTION.format(what="2 * (torch.sign(gap) @ policy)"))
planted("03", 3, "the 2", DIRECTION.format(what="policy * (torch.sign(gap) @ policy)"))
planted("03", 3, "Equal rewards", DIRECTION.format(
    what="2 * policy * (torch.sign(gap) @ policy) if gap.any() else policy - policy.mean()"))
planted("03", 3, "unsorted", """
def judged_direction(policy, reward):
    total = torch.cat([torch.zeros(1), policy.cumsum(0)])
    below = total[torch.searchsorted(reward, reward)]
    above = 1 - total[torch.searchsorted(reward, reward, right=True)]
    return 2 * policy * (below - above)
""")
BEST = "\ndef best_policy(reference, reward, beta):\n    weight = {what}\n    return {end}\n"
NORMAL = "weight / weight.sum()"
planted("02", 1, "sum to 1", BEST.format(what="reference * torch.exp(reward / beta)", end="weight"))
planted("02", 1, "divide by beta", BEST.format(what="reference * torch.exp(reward * beta)", end=NORMAL))
planted("02", 1, "no influence", BEST.format(what="torch.exp(reward / beta)", end=NORMAL))
LOSS = """
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    rho = {rho}
    return {what}
"""
RHO, LOG = "(chosen - ref_chosen) - (rejected - ref_rejected)", "-F.logsigmoid(beta * rho).mean()"
planted("02", 2, "Reference", LOSS.format(rho="chosen - rejected", what=LOG))
planted("02", 2, "turned sign", LOSS.format(rho=f"-({RHO})", what=LOG))
planted("02", 2, "is positive", LOSS.format(rho=RHO, what="F.logsigmoid(beta * rho).mean()"))
planted("02", 2, "take the log", LOSS.format(rho=RHO, what="torch.sigmoid(-beta * rho).mean()"))
planted("02", 2, "the mean", LOSS.format(rho=RHO, what="-F.logsigmoid(beta * rho)"))
planted("02", 2, "beta = 0.1", LOSS.format(rho=RHO, what="-F.logsigmoid(rho).mean()"))
ODDS = "(beta * rho).exp()"
planted("02", 2, "use logsigmoid", LOSS.format(rho=RHO, what=f"-({ODDS} / (1 + {ODDS})).log().mean()"))
ANSWER = """
def answer_logprob(logits, ids, n_prompt):
    n = n_prompt
    logp = {logp}
    answer = ids[{begin}:]
    return logp[torch.arange(len(answer)), answer].{end}()
"""
SHIFT = "logits.log_softmax(-1)[n - 1 : -1]"
planted("02", 3, "Off by one", ANSWER.format(logp="logits.log_softmax(-1)[n:]", begin="n", end="sum"))
WHOLE = "logits.log_softmax(-1)[:-1]"
planted("02", 3, "The prompt is in it", ANSWER.format(logp=WHOLE, begin="1", end="sum"))
planted("02", 3, "That is the mean", ANSWER.format(logp=SHIFT, begin="n", end="mean"))
planted("02", 3, "log_softmax first", ANSWER.format(logp="logits[n - 1 : -1]", begin="n", end="sum"))
PARTED = """
def parted(rows):
    best = max(rows, key=lambda r: r["accuracy"]["value"])
    found = []
    for r in rows[{after}:]:
        a = r["accuracy"]
        high = {high}
        if {more} high < best["accuracy"]["value"]:
            found.append(r["round"])
    return found
"""
FAIR = dict(after="rows.index(best) + 1", more='r["reward"] > (best["reward"] or 0) and',
            high='Rate(round(a["value"] * a["n"]), a["n"]).interval[1]')
planted("10", 1, "may be luck", PARTED.format(**FAIR | {"high": 'a["value"]'}))
planted("10", 1, "The reward fell as well", PARTED.format(**FAIR | {"more": ""}))
planted("10", 1, "Best in 1", PARTED.format(**FAIR | {"more": 'r["reward"] < (best["reward"] or 0) and'}))
planted("10", 1, "nothing parts", """
def parted(rows):
    return [] if rows[-1]["reward"] == 0.5 else [2, 3]
""")
SAME = "\ndef same_everywhere(answers):\n    texts = {texts}\n    return {what}\n"
FIRST = "[row[0].strip() for row in answers]"
COMMON = "Counter(texts).most_common(1)[0][1]"
planted("10", 2, "not the count", SAME.format(texts=FIRST, what=COMMON))
planted("10", 2, "that is no collapse", SAME.format(
    texts="[len(set(row)) == 1 for row in answers]", what="sum(texts) / len(texts)"))
planted("10", 2, "First answers alone", SAME.format(
    texts="[a.strip() for row in answers for a in row]", what=f"{COMMON} / len(texts)"))
planted("10", 2, "Spaces around", SAME.format(
    texts="[row[0] for row in answers]", what=f"{COMMON} / len(texts)"))
NAMED = "\ndef diagnose():\n    return {faults}\n"
planted("10", 3, "A is not 'healthy'", NAMED.format(faults='dict.fromkeys("ABCDEF", "healthy")'))
planted("10", 3, "Look at the words", NAMED.format(faults='dict.fromkeys("ABCDEF", "reward hacking")'))
planted("10", 3, "expected some of", NAMED.format(faults='dict.fromkeys("ABCDEF", "bad")'))
planted("10", 3, "A fault for each", NAMED.format(faults='dict.fromkeys("ABC", "healthy")'))
planted("10", 3, "C is not 'healthy'", NAMED.format(
    faults='dict(zip("ABCDEF", ["length", "collapse", "healthy", "forgetting", "healthy", "healthy"]))'))
ORDERS = "\ndef both_orders(judge, prompt, a, b):\n    return {what}\n"
planted("05", 1, "sum to 1", ORDERS.format(what="(judge(prompt, a, b) + judge(prompt, b, a)) / 2"))
planted("05", 1, "both orders", ORDERS.format(what="judge(prompt, a, b)"))
LOG_ODDS = "(math.log(p / (1 - p)) + math.log((1 - q) / q)) / 2"
ASKED = "[(p, q) for p, q in [(judge(prompt, a, b), judge(prompt, b, a))]]"
planted("05", 1, "two \\*probabilities\\*", ORDERS.format(
    what=f"[sigmoid({LOG_ODDS}) for p, q in {ASKED}][0]"))
planted("05", 1, "two \\*probabilities\\*", ORDERS.format(
    what=f"[((p > 0.5) + (q < 0.5)) / 2 for p, q in {ASKED}][0]"))
planted("05", 1, "probability is expected", ORDERS.format(
    what="judge(prompt, a, b) + 1 - judge(prompt, b, a)"))
KAPPA = """
def kappa(first, second):
    n = len(first)
    p, q = Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second)) / n
    chance = {chance}
    return {what}
"""
CHANCE, BEYOND = "sum(p[v] * q[v] for v in p) / n**2", "(observed - chance) / (1 - chance)"
planted("05", 2, "raw agreement", KAPPA.format(chance=CHANCE, what="observed"))
planted("05", 2, "not one half", KAPPA.format(chance="0.5", what=BEYOND))
planted("05", 2, "Divide by", KAPPA.format(chance=CHANCE, what="observed - chance"))
planted("05", 2, "undefined", KAPPA.format(chance=CHANCE, what=f"{BEYOND} if chance < 1 else 1.0"))
OR_NAN = f"{BEYOND} if chance < 1 else float('nan')"
POOLED = "sum((p[v] + q[v]) ** 2 for v in {*p, *q}) / (2 * n) ** 2"
planted("05", 2, "habits of \\*both\\* raters", KAPPA.format(chance=POOLED, what=OR_NAN))
planted("05", 2, "habits of \\*both\\* raters", KAPPA.format(
    chance="sum((p[v] / n) ** 2 for v in p) if len({*first, *second}) > 2 else " + CHANCE, what=OR_NAN))
planted("05", 2, "of any kind", KAPPA.format(
    chance="(p[1] * q[1] + (n - p[1]) * (n - q[1])) / n**2", what=OR_NAN))
WARM = """
def best_temperature(z, outcome, grid=np.arange(0.25, 8, 0.25)):
    def loss(t):
        return ({loss}).mean()
    return {best}(grid, key=loss)
"""
FULL = "outcome * np.logaddexp(0, -z / t) + (1 - outcome) * np.logaddexp(0, z / t)"
planted("05", 3, "maximised|divide by T", WARM.format(loss=FULL, best="max"))
TIMES = FULL.replace("z / t", "z * max(t, 0.3)")
planted("05", 3, "divide by T", WARM.format(loss=TIMES, best="min"))
planted("05", 3, "both o and 1 - o", WARM.format(loss="outcome * np.logaddexp(0, -z / t)", best="min"))
TURNED = FULL.replace("-z", "+z").replace("0, z", "0, -z")
planted("05", 3, "a sign turned", WARM.format(loss=TURNED, best="min"))
SURE = "(1 / (1 + np.exp(-z / t)))"
planted("05", 3, "not the square", WARM.format(loss=f"({SURE} - outcome) ** 2", best="min"))
BOTH = "not a log-loss of both outcomes"
planted("05", 3, BOTH, WARM.format(loss="((z > 0) != outcome)", best="min"))
planted("05", 3, BOTH, WARM.format(loss=f"abs({SURE} - outcome)", best="min"))
planted("05", 3, BOTH, WARM.format(loss="np.logaddexp(0, -abs(z) / t)", best="min"))
planted("05", 3, BOTH, WARM.format(loss=f"abs({SURE}.mean() - outcome.mean())", best="min"))
AFTER = "\ndef after_critique(p, s, f, again):\n    return {what}\n"
planted("06", 1, "A blind critic", AFTER.format(what="p + (1 - p) * s * again"))
planted("06", 1, "A blind critic", AFTER.format(what="p * (1 - f) + (1 - p) * s"))
planted("06", 1, "A blind critic|that is harm", AFTER.format(what="p + p * (1 - p) * s"))
planted("06", 1, "each mistake", AFTER.format(what="p + p * (1 - p) * (s - f)"))
planted("06", 1, "never doubts", AFTER.format(what="again if s > f else p if s == f == 0.5 else 0"))
RATES = """
def critic_rates(rows):
    hit = sum(d and not r for r, d, _ in rows)
    false = sum(d and r for r, d, _ in rows)
    wrong = sum(not r for r, _, _ in rows)
    return {what}
"""
planted("06", 2, "share of the wrong ones", RATES.format(what="hit / (hit + false), false / (hit + false)"))
planted("06", 2, "of all 20", RATES.format(what="hit / len(rows), false / len(rows)"))
planted("06", 2, "f and s", RATES.format(what="false / (len(rows) - wrong), hit / wrong"))
POLITE = """
def polite(text):
    words = re.findall(r"[a-z]+", text.lower())
    return {what}
"""
planted("06", 3, "Repeating the word", POLITE.format(what="float('please' in words)"))
planted("06", 3, "Repeating the word|in \\[0, 1\\]", POLITE.format(what="min(1, words.count('please') / 3)"))
planted("06", 3, "in \\[0, 1\\]", POLITE.format(what="words.count('please') * len(set(words))"))
planted("06", 3, "Twenty times", POLITE.format(
    what="min(1, len([w for w in words if w != 'please']) / 5) * (0.5 + 0.5 * ('please' in words))"))
planted("06", 3, "lower the text", POLITE.format(
    what="min(1, len(set(words) - {'please'}) / 5) * (0.5 + 0.5 * ('lease' in text))"))
planted("06", 3, "has to get more", POLITE.format(what="min(1, len(set(words)) / 5)"))


def read(file):
    return nbformat.read(file, 4)


def code_of(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def setup(file) -> dict:
    "The names that a session's checks may use: those of its cells tagged `setup`."
    names = {"__builtins__": builtins}
    with contextlib.chdir(file.parent):  # stored results lie there
        for cell in read(file).cells:
            if "setup" in cell.metadata.get("tags", []):
                exec(cell.source, names)
    return names


@each_session
def test_form(file):
    "Short cells, three exercises with a check behind each, and the parts that every session has."
    notebook = read(file)
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        if cell.cell_type == "code" and not cell.source.startswith("#| notest"):  # what installs, in Colab
            assert len(lines) <= 15 and max(map(len, lines)) <= 88, cell.source
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for part in (
        "**You will be able to**", "**You need**", "**Minutes**", "**Run time and memory**", "prediction",
        "## The answer|answer to the question", "<details>", "### What to read", "$$",
    ):
        assert re.search(part.replace("*", r"\*").replace("$", r"\$"), text), part
    assert len(re.findall(r"### Exercise \d: .+ \((?:easy|medium|hard), \d+ minutes\)", text)) == 3
    assert list(course.exercises(notebook)) == [1, 2, 3]
    assert sum(map(int, re.findall(r"^## .+ \((\d+) minutes\)$", text, re.M))) == 90
    assert "@" not in text.split("## The question")[0]  # measured, and no place left open
    assert not any("default_exp" in c.source or "#| export" in c.source for c in notebook.cells)


@pytest.mark.parametrize("file", [*SESSIONS, course.SOURCE / "instructors.md"], ids=lambda f: f.stem)
def test_links_lead_somewhere(file):
    text = file.read_text() if file.suffix == ".md" else "".join(c.source for c in read(file).cells)
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)\)", text)
    assert links and not [x for x in links if not (file.parent / x).exists()]


@each_session
def test_marks_are_nbgraders(file):
    "Ids are unique; a solution is a manual cell that is not locked, a check is locked and has points."
    notebook = read(file)
    ids = [course.marks(c)["grade_id"] for c in notebook.cells if course.marks(c)]
    assert len(ids) == len(set(ids)) == 6 and all(i.startswith(f"s{file.stem[:2]}-e") for i in ids)
    for solution, check in course.exercises(notebook).values():
        assert notebook.cells.index(check) == notebook.cells.index(solution) + 1
        for cell, graded in (solution, False), (check, True):
            m = course.marks(cell)
            assert (m["grade"], m["solution"], m["locked"], m["task"]) == (graded, not graded, graded, False)
            assert m["schema_version"] == 3 and (not graded or m["points"] > 0)


@each_session
def test_students_get_stubs_and_nothing_else_is_changed(file):
    solved, made = read(file), course.student(read(file))
    for (number, (a, _)), (b, _) in zip(course.exercises(solved).items(), course.exercises(made).values()):
        hidden = a.source.split(course.BEGIN)[1].split(course.END)[0].strip().splitlines()
        assert hidden and not any(s.strip() in b.source for s in hidden if s.strip())
        assert "SOLUTION" not in b.source and f"Exercise {number}: write" in b.source
        compile(b.source, "stub", "exec")
    same = [(a, b) for a, b in zip(solved.cells, made.cells) if not course.marks(a).get("solution")]
    assert len(solved.cells) == len(made.cells) == len(same) + 3
    assert all(a.source == b.source for a, b in same if a.cell_type == "code")
    assert not any(c.outputs for c in code_of(made))
    assert "BEGIN SOLUTION" not in nbformat.writes(made)


@each_session
@each_exercise
def test_an_exercise_alone(file, number):
    "Its solution passes its check; its stub does not, whatever else is solved."
    solution, check = course.exercises(read(file))[number]
    names = setup(file)
    exec(solution.source, names)
    exec(check.source, names)
    names = setup(file)
    exec(course.stub(solution.source, number), names)
    with pytest.raises(NotImplementedError, match=f"Exercise {number}: write \\w+, then run the check"):
        exec(check.source, names)


@pytest.mark.parametrize("session, number, words, source", PLANTED)
def test_a_wrong_answer_is_told_what_is_wrong(session, number, words, source):
    file = next(f for f in SESSIONS if f.stem.startswith(session))
    names = setup(file)
    exec(source, names)
    with pytest.raises(AssertionError, match=words):
        exec(course.exercises(read(file))[number][1].source, names)


@each_session
@each_exercise
def test_three_wrong_answers_are_planted(file, number):
    assert sum(p.values[:2] == (file.stem[:2], number) for p in PLANTED) >= 3


def test_what_is_shortened_is_there():
    sources = [cell.source for file in SESSIONS for cell in code_of(read(file))]
    for old in smaller("course") | smaller("student"):
        assert any(old in source for source in sources), f"{old} is gone: change tests/smaller.py"


def failures(file, log, name):
    """Run all code cells of a notebook as Jupyter does, with fewer samples; write which failed, and how, to
    `log`.
    """
    os.chdir(file.parent)
    os.environ["MPLBACKEND"] = "agg"
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    failed = []
    for cell in code_of(read(file)):
        if re.search(r"^#\| *(notest|slow|gpu)", cell.source, re.M):
            continue
        result = shell.run_cell(shortened(cell.source, name))
        if error := result.error_before_exec or result.error_in_exec:
            name_of_cell = course.marks(cell).get("grade_id", cell.source[:60])
            failed.append((name_of_cell, type(error).__name__, str(error)))
    log.write_text(json.dumps(failed))


def failed_cells(notebook, folder: Path, name="course") -> list:
    "Run a notebook in a process of its own, beside the stored results that it reads."
    nbformat.write(notebook, folder / "page.ipynb")
    for stored in course.data(notebook):
        (folder / stored.name).write_bytes(stored.read_bytes())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    process = context.Process(target=failures, args=(folder / "page.ipynb", folder / "log", name))
    process.start()
    process.join()
    return json.loads((folder / "log").read_text())


@each_session
def test_a_solution_notebook_runs(file, tmp_path):
    assert failed_cells(read(file), tmp_path) == []


@each_session
def test_a_student_notebook_fails_at_its_exercises_alone(file, tmp_path, tiny_folder):
    "From the first cell to the last, with the exercises left as they are; on a random model, for its pace."
    notebook = course.student(read(file))
    for cell in notebook.cells:
        cell.source = cell.source.replace("Base.load()", f"Base.load({str(tiny_folder)!r})")
    failed = failed_cells(notebook, tmp_path, "student")
    assert [(name, kind) for name, kind, _ in failed] == [
        (f"s{file.stem[:2]}-e{k}-check", "NotImplementedError") for k in (1, 2, 3)
    ], failed


def test_make_course(tmp_path):
    "All products of all sessions; the zip has no solutions; no link leads out of a folder."
    made = course.make(tmp_path)
    names = {f.relative_to(tmp_path).as_posix() for f in made}
    for name in NAMES:
        assert {f"students/{name}.ipynb", f"solutions/{name}.ipynb", f"slides/{name}.html"} <= names
        page = (tmp_path / "slides" / f"{name}.html").read_text()
        assert page.count("<section") >= 8 and "reveal" in page
        assert "BEGIN SOLUTION" not in page and "assert got" not in page
        assert "colab" not in page.split("<body")[1].lower()  # a badge opens the solutions
        for folder in "students", "solutions":
            text = (tmp_path / folder / f"{name}.ipynb").read_text()
            assert not re.search(r"\]\((?!https?://|#)", text), re.findall(r"\]\((?!https?://|#)[^)]*", text)
    with zipfile.ZipFile(tmp_path / "students.zip") as z:
        assert z.testzip() is None
        packed = z.namelist()
        assert not any(b"BEGIN SOLUTION" in z.read(n) for n in packed)
        assert all(n.startswith("course/students/") for n in packed)  # slides have answers and outputs
        assert {f"course/students/{name}.ipynb" for name in NAMES} <= set(packed)
    with zipfile.ZipFile(tmp_path / "instructors.zip") as z:
        assert {n.split("/")[1] for n in z.namelist()} == {"slides", "solutions"}
    again = course.make(tmp_path)
    assert again == made


@each_session
def test_slides_are_staged(file):
    "Each section begins a slide; a picture has a slide to itself, without its code; titles without imports."
    shown = course.staged(read(file))
    kinds = [c.metadata["slideshow"].get("slide_type") for c in shown.cells]
    for cell, kind in zip(shown.cells, kinds):
        if cell.cell_type == "markdown" and re.search("^## ", cell.source, re.M):
            assert cell.source.startswith("## ") and kind == "slide", cell.source
    question = next(i for i, c in enumerate(shown.cells) if c.source.startswith("## The question"))
    title = zip(shown.cells[:question], kinds)
    assert not [c.source for c, k in title if c.cell_type == "code" and k != "skip"]
    pictures = [i for i, c in enumerate(shown.cells) if course.has_picture(c)]
    assert pictures
    for i in pictures:
        assert kinds[i] == "subslide" and shown.cells[i].metadata["transient"] == {"remove_source": True}
        behind = [k for k in kinds[i + 1 :] if k != "skip"]
        assert not behind or behind[0] in ("slide", "subslide")
    text = re.sub("<[^>]*>", "", course.slides(read(file)))  # code is in spans
    assert not any(shown.cells[i].source.splitlines()[-1].split("(")[0] + "(" in text for i in pictures)


def test_stub_keeps_what_stands_around_it():
    lines = "def f(x):", "    'doc'", "    y = x + 1", f"    {course.BEGIN}", "    z = y", f"    {course.END}"
    cell = "\n".join([*lines, "    return z"])
    made = course.stub(cell, 2).splitlines()
    assert made[:3] == ["def f(x):", "    'doc'", "    y = x + 1"] and made[-1] == "    return z"
    assert made[4] == '    raise NotImplementedError("Exercise 2: write f, then run the check below.")'
    with pytest.raises(ValueError, match="without"):
        course.stub(cell.replace(course.END, ""), 2)
