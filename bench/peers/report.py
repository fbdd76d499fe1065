"""Statistics, JSON and Markdown of bench/peers/run.py."""

import random
import statistics

PEER_BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _by_round(function, *columns):
    """One value a round: the samples of a round were taken one after the other."""
    return [function(*values) for values in zip(*columns)]


def _ratio(peer, own):
    return spread(_by_round(lambda p, k: p / k, peer, own))


def _ratio_of_medians(peer, own):
    """Where ratios of rounds mean nothing, as one of kvant's is not positive: the ratio of the
    medians and what 90 % of resampled rounds give, without an end where kvant's may be nothing."""
    if statistics.median(own) <= 0:
        return None
    draw = random.Random(1)
    ratios = []
    for _ in range(10000):
        rounds = [draw.randrange(len(own)) for _ in own]
        base = statistics.median(own[i] for i in rounds)
        ratios.append(statistics.median(peer[i] for i in rounds) / base if base > 0
                      else float("inf"))
    ratios.sort()
    high = ratios[len(ratios) * 19 // 20]
    return {"median": statistics.median(peer) / statistics.median(own), "of_medians": True,
            "min": ratios[len(ratios) // 20], "max": None if high == float("inf") else high}


def decode_rows(samples, results, depths, main):
    """One row for every engine and cache. Ratios are of times, peer over kvant's `main` cache."""
    shallow, deep = ([key for key in samples if key[2:] == ("decode", depth)] for depth in depths)
    rows = []
    for at_shallow, at_deep in zip(shallow, deep):
        engine, cache = at_shallow[:2]
        growth = _by_round(lambda a, b: b - a, samples[at_shallow], samples[at_deep])
        row = {"engine": engine, "cache": cache, "shallow": spread(samples[at_shallow]),
               "deep": spread(samples[at_deep]), "growth": spread(growth),
               "floor": results["floor"].get(f"{engine} {cache}")}
        if engine != "kvant":
            base = [samples["kvant", main, "decode", depth] for depth in depths]
            base_growth = _by_round(lambda a, b: b - a, *base)
            row["ratio"] = {
                "shallow": _ratio(samples[at_shallow], base[0]),
                "deep": _ratio(samples[at_deep], base[1]),
                # Nothing can be told where the noise is more than what the context costs kvant.
                "growth": (_ratio if min(base_growth) > 0 else _ratio_of_medians)(
                    growth, base_growth)}
        rows.append(row)
    return rows


def prefill_rows(samples, lengths, main, wrong):
    rows = []
    for engine, cache in dict.fromkeys(key[:2] for key in samples if key[2] == "prefill"):
        row = {"engine": engine, "cache": cache, "wrong": engine in wrong, "lengths": {}}
        for length in lengths:
            own = samples.get((engine, cache, "prefill", length))
            if own is None:
                continue
            cell = {"seconds_per_token": spread(own)}
            if engine != "kvant":
                base = samples["kvant", main, "prefill", length]
                cell["ratio"] = _ratio(own, base)
            row["lengths"][length] = cell
        rows.append(row)
    return rows


def floor_seconds(bytes_of_weights, kv_values, bits, gb_per_s):
    return (bytes_of_weights + kv_values * bits / 8) / (gb_per_s * 1e9)


def _range(value, scale, digits):
    low, mid, high = (f"{value[k] * scale:.{digits}f}" for k in ("min", "median", "max"))
    return f"{mid} [{low}, {high}]"


def _speed(value):
    return (f"{1 / value['median']:.1f} [{1 / value['max']:.1f}, {1 / value['min']:.1f}]")


def _times(value, bold=True):
    mark = "**" if bold else ""
    high = "more" if value["max"] is None else f"{value['max']:.2f}"
    of = " of medians" if value.get("of_medians") else ""
    return f"{mark}{value['median']:.2f}x{mark} [{value['min']:.2f}, {high}]{of}"


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def markdown(results):
    """The whole report."""
    parts = [f"### {results['model']}", _setting(results)]
    if results["perplexity"]:
        parts.append(_perplexity(results))
    if results["decode"]:
        parts += [_decode(results), _decode_summary(results)]
    if results["prefill"]:
        parts.append(_prefill(results))
    return "\n\n".join(parts) + "\n"


def _setting(results):
    engines = "; ".join(f"{name}: {about}" for name, about in results["engines"].items())
    return (f"{results['threads']} threads, {results['rounds']} rounds, engines in turn. {engines}. "
            + (f"Not supported by the peer: {', '.join(results['left_out'])}. "
               if results["left_out"] else "")
            + f"{results['cpu']}. Read bandwidth {results['read_gb_per_s']:.1f} GB/s; weights read for "
            f"a token {results['weight_bytes'] / 1e6:.0f} MB.")


def _perplexity(results):
    rows = []
    for row in results["perplexity"]:
        caches = ", ".join(f"{cache} {value:.2f}" for cache, value in row["by_cache"].items())
        single = row.get("single")
        verdict = row["verdict"] + (
            f"; one token at a time {single['peer']:.2f} (kvant {single['kvant']:.2f})"
            if single else "")
        rows.append([row["engine"], caches, verdict])
    return _table(["engine", f"perplexity, {results['check_chunks']} chunks of "
                   f"{results['check_ctx']}", "check"], rows)


def _decode(results):
    shallow, deep = results["depths"]
    header = ["engine", "cache", f"tokens/s at {shallow}", f"tokens/s at {deep}",
              f"ms at {deep}", f"t({deep}) − t({shallow}), ms", f"ms over floor at {deep}",
              f"peer / kvant {results['main']}: t({shallow})", f"t({deep})", "difference"]
    rows = []
    for row in results["decode"]:
        floor = f"{row['deep']['median'] / row['floor']:.2f}x" if row["floor"] else ""
        ratio = row.get("ratio")
        ratios = ([_times(ratio[k]) if ratio[k] else "lost in noise"
                   for k in ("shallow", "deep", "growth")] if ratio else ["", "", ""])
        rows.append([row["engine"], row["cache"], _speed(row["shallow"]), _speed(row["deep"]),
                     f"{row['deep']['median'] * 1e3:.2f}", _range(row["growth"], 1e3, 2), floor,
                     *ratios])
    return _table(header, rows)


def _decode_summary(results):
    """kvant against the best cache type of each peer, measure by measure."""
    shallow, deep = results["depths"]
    names = {"shallow": f"t({shallow})", "deep": f"t({deep})",
             "growth": f"t({deep}) − t({shallow})"}
    lines = []
    for peer in dict.fromkeys(row["engine"] for row in results["decode"] if "ratio" in row):
        best = []
        for measure, name in names.items():
            rows = [row for row in results["decode"] if row["engine"] == peer]
            row = min(rows, key=lambda row, m=measure: row[m]["median"])
            if row["ratio"][measure]:
                best.append(f"{name} {row['ratio'][measure]['median']:.2f}x ({row['cache']})")
        lines.append(f"kvant {results['main']} against the best cache type of {peer}: "
                     + ", ".join(best) + ".")
    for row in results["decode"]:
        if row["engine"] == "kvant" and row["floor"]:
            lines.append(f"kvant {row['cache']} at {deep}: {row['deep']['median'] * 1e3:.2f} ms; "
                         f"reading its weights and cache takes {row['floor'] * 1e3:.2f} ms.")
    return "\n".join(lines)


def _prefill(results):
    lengths = results["prefills"]
    header = ["engine", "cache"]
    for length in lengths:
        header += [f"prefill of {length}, tokens/s", f"kvant {results['main']} is faster"]
    rows = []
    for row in results["prefill"]:
        cells = [row["engine"], row["cache"]]
        for length in lengths:
            cell = row["lengths"].get(length)
            if row["wrong"] or cell is None:
                cells += ["wrong answers, not compared" if row["wrong"] else "", ""]
            else:
                cells += [_speed(cell["seconds_per_token"]),
                          _times(cell["ratio"]) if "ratio" in cell else ""]
        rows.append(cells)
    for name in results["wrong"]:
        rows.append([name, "all"] + ["wrong answers, not compared", ""] * len(lengths))
    return _table(header, rows)
