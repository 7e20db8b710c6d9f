"""The view of head_subspace: the nodes, what compression keeps, what an exchange moves."""

from typing import TYPE_CHECKING, Any

from underhood.view import View, grid, group, lines, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["heads_view"]

_SHOWN = 12
_NAMES = {"qk": "queries and keys", "ov": "values", "both": "queries, keys and values"}


def heads_view(data: "xarray.Dataset") -> View:
    """Everything, claim and control side by side."""
    views = [sentences(_sentences(data)), _nodes(data), _sizes(data)]
    views += [_ranks(data, "kept"), _exchange(data)]
    if data.sizes["head"] > 1:
        views.append(_by_head(data))
    if "kept_other" in data:
        views.append(_ranks(data, "kept_other"))
    return group(views, title="Output nodes and the subspaces of their heads")


def _sentences(data: "xarray.Dataset") -> list[str]:
    size, share = int(data.attrs["chosen"]), data.attrs["recover"]
    found = []
    if size < 0:
        found.append(f"No set of nodes carries {share:.0%} of the logit difference directly.")
    else:
        at = data["step"].values.tolist().index(size)
        found.append(
            f"{size} of {data.sizes['node']} nodes write {float(data['summed'][at]):.0%} of the"
            f" logit difference ({float(data['logit_diff']):+.2f}); with every other node at its"
            f" mean {float(data['left'][at]):.0%} of it is left (random nodes of the same layers:"
            f" {float(data['left_random']):.0%})."
        )
    last = data["head"].values[-1]
    for part in ("qk", "ov"):
        one = data.sel(part=part).isel(head=-1)
        needed = float(one["needed"])
        if needed != needed:
            top = one.isel(rank=-1)
            why = (
                "their mean does as well"
                if float(one["kept"].isel(rank=1)) != float(one["kept"].isel(rank=1))
                else f"rank {int(top['rank'])} keeps {float(top['kept']):.0%}"
            )
            found.append(f"No rank tried is enough for the {_NAMES[part]} of {last}: {why}.")
            continue
        at = one.sel(rank=int(needed))
        found.append(
            f"{int(needed)} dimension{'s' * (needed != 1)} of the {_NAMES[part]} of {last} keep"
            f" {float(at['kept']):.0%} (random subspaces at best {float(at['kept_random']):.0%});"
            f" exchanged with the contrast's they move the answer {float(at['exchanged']):+.0%} of"
            f" the way, everything there {float(one['exchanged_whole']):+.0%}."
        )
    return found


def _nodes(data: "xarray.Dataset") -> View:
    rows: list[list[Any]] = []
    for i in range(min(_SHOWN, data.sizes["node"])):
        one = data.isel(node=i)
        rows.append([
            str(one["node"].values), float(one["direct"]), float(one["total"]), bool(one["output"])
        ])  # fmt: skip
    return table(
        [
            "node", {"name": "direct", "unit": "logits", "format": "+.2f"},
            {"name": "total", "unit": "logits", "format": "+.2f"}, "output node",
        ],
        rows, title="Nodes by direct effect",
        about="Direct: what the node writes along answer minus wrong, the norm's scale frozen."
        " Total: what is lost when it is mean-ablated at the last token.",
    )  # fmt: skip


def _sizes(data: "xarray.Dataset") -> View:
    series = {"sum of direct effects": data["summed"], "left by edit": data["left"]}
    return lines(
        data["step"].values, series, x_name="nodes, largest direct effect first",
        y_name="share of the logit difference", title="How many nodes are enough",
        about="Left by edit: all other nodes write their mean at the end of the stream, held-out"
        " rows.",
    )  # fmt: skip


def _ranks(data: "xarray.Dataset", name: str) -> View:
    one = data.isel(head=-1)
    series = {_NAMES[p]: one[name].sel(part=p) for p in ("qk", "ov", "both")}
    series |= {f"random, {_NAMES[p]}": one[f"{name}_random"].sel(part=p) for p in ("qk", "ov")}
    where = "other prompts, the same subspaces" if name == "kept_other" else "held-out rows"
    return lines(
        one["rank"].values, series, x_name="dimensions kept", y_name="share kept",
        title=f"Compression of {one['head'].item()}: {where}",
        about="1 = nothing lost, 0 = as with the mean alone. Random: the best of the draws. A"
        " broken line: the mean alone does as well, so there is nothing to keep.",
    )  # fmt: skip


def _exchange(data: "xarray.Dataset") -> View:
    one = data.isel(head=-1).sel(part="both")
    series = {
        "the subspace": one["exchanged"], "everything but it": one["exchanged_rest"],
        "random subspaces": one["exchanged_random"],
    }  # fmt: skip
    whole = [float(data.isel(head=-1)["exchanged_whole"].sel(part=p)) for p in ("qk", "ov", "both")]
    return lines(
        one["rank"].values, series, x_name="dimensions exchanged",
        y_name="of the way to the contrast",
        title=f"The contrast's subspace in the clean run: {one['head'].item()}",
        about=f"Everything exchanged: queries and keys {whole[0]:+.2f}, values {whole[1]:+.2f},"
        f" both {whole[2]:+.2f}. Random: the strongest of the draws.",
    )  # fmt: skip


def _by_head(data: "xarray.Dataset") -> View:
    rows, values = [], []
    for head in data["head"].values:
        for part in ("qk", "ov"):
            rows.append(f"{head} {part}")
            values.append(data["kept"].sel(head=head, part=part).values)
    return grid(
        values, rows=rows, cols=data["rank"].values, row_name="head", col_name="dimensions kept",
        unit="share kept", limit=1.0, title="Compression, head by head",
        about="Hatched: the head's mean alone does as well.",
    )  # fmt: skip
