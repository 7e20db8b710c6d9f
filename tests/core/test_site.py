"""Site names: one text form that round-trips, TransformerLens names read, typos answered."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from underhood.core.errors import SiteNotFound, UsageError
from underhood.core.site import _TL_LAYERED, _TL_PLAIN, KINDS, STACKS, Site, parse_many

NUMBERS = st.integers(min_value=0, max_value=10**6)
PATHS = st.from_regex(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+){0,4}", fullmatch=True)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    """Any site that can be written."""
    name = draw(st.sampled_from([*KINDS, "module", "module_in"]))
    if name.startswith("module"):
        return Site(name, path=draw(PATHS))
    kind = KINDS[name]
    layer = draw(st.none() | NUMBERS) if kind.layered else None
    addressed = layer is not None or not kind.layered
    unit = draw(st.none() | NUMBERS) if kind.unit is not None and addressed else None
    return Site(name, layer, unit, draw(st.sampled_from(("", *STACKS))))


@given(sites())
def test_text_form_round_trips(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site
    assert parse_many([str(site), site]) == [site, site]


@given(sites())
def test_whole_and_at(site: Site) -> None:
    assert site.whole.unit is None and site.whole.whole == site.whole
    if site.kind.layered:
        assert site.at(3).layer == 3 and not site.at(3).spreads


@given(sites(), sites())
def test_equal_text_means_equal_site(a: Site, b: Site) -> None:
    assert (str(a) == str(b)) == (a == b) == (hash(a) == hash(b) and a == b)


@given(st.text(max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    """Nothing but a typed refusal, whatever is typed; what is accepted has a stable text form."""
    try:
        site = Site.parse(text)
    except SiteNotFound as error:
        assert error.do
        return
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("theirs", [*_TL_PLAIN])
def test_transformerlens_names(theirs: str) -> None:
    site = Site.parse(theirs)
    assert str(site) == _TL_PLAIN[theirs]
    assert Site.parse(str(site)) == site  # read as an alias, never written


@pytest.mark.parametrize("theirs", [*_TL_LAYERED])
def test_transformerlens_names_with_layers(theirs: str) -> None:
    site = Site.parse(f"blocks.7.{theirs}")
    assert site == Site(_TL_LAYERED[theirs], 7)


def test_an_alias_that_means_something_else_is_not_one() -> None:
    """Their `hook_mlp_in` is the stream before the norm, our `mlp_in` comes after it."""
    with pytest.raises(SiteNotFound):
        Site.parse("blocks.3.hook_mlp_in")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resid_pots.3", "resid_post"),
        ("patern.0", "pattern"),
        ("attnout.1", "attn_out"),
        ("resid-mid.2", "resid_mid"),
        ("mlp_pos.0.3", "mlp_post"),
        ("blocks.5.hook_resid_pst", "blocks.5.hook_resid_post"),
        ("blocks.5.attn.hook_patern", "blocks.5.attn.hook_pattern"),
        ("router_logit.0", "router_logits"),
    ],
)
def test_typos_are_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(SiteNotFound) as caught:
        Site.parse(typed)
    assert meant in (caught.value.do or "")
    name = typed if typed.startswith("blocks") else typed.partition(".")[0]
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "module:", "resid_post.-1", "resid_post.1.2.3", "z.1.x", "embed.1.2", "resid_post.1.",
     ".z.1", "enc.enc.z.1", "enc", "dec.", "pattern.1..2", "router_index.0.1", "z. 1"],
)  # fmt: skip
def test_malformed(text: str) -> None:
    with pytest.raises(SiteNotFound):
        Site.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "resid_post", "layer": -1},
        {"name": "z", "layer": 1, "unit": -2},
        {"name": "z", "unit": 2},
        {"name": "embed", "layer": 0},
        {"name": "z", "layer": 1, "stack": "encoder"},
        {"name": "z", "layer": 1, "path": "model.layers.0"},
        {"name": "module", "layer": 1, "path": "lm_head"},
        {"name": "module"},
    ],
)
def test_what_has_no_text_form_cannot_be_made(arguments: dict[str, object]) -> None:
    with pytest.raises(SiteNotFound) as caught:
        Site(**arguments)  # type: ignore[arg-type]
    assert caught.value.do


def test_several_in_one_string() -> None:
    assert parse_many("z.1, resid_post ,pattern.0.2") == [
        Site("z", 1), Site("resid_post"), Site("pattern", 0, 2)
    ]  # fmt: skip
    for nothing in ("", " , ", []):
        with pytest.raises(UsageError, match="no site was named"):
            parse_many(nothing)


def test_every_kind_says_what_it_is() -> None:
    for name, kind in KINDS.items():
        assert kind.axes[0] == "batch" and kind.about, name
        # An expert's share lies in whatever slots chose it.
        assert kind.unit is None or kind.unit in kind.axes or "slot" in kind.axes, name
        assert len(set(kind.axes)) == len(kind.axes), name


def test_hook_pre_is_what_enters_the_nonlinearity() -> None:
    """The gate of a gated MLP, the only projection of a plain one; unknown layers are refused."""
    import underhood as uh
    from underhood.core.errors import OutOfRange

    found = {f: uh.load(f"random/{f}").resolve("blocks.0.mlp.hook_pre") for f in ("llama", "gpt2")}
    assert [str(s) for sites in found.values() for s in sites] == ["mlp_gate.0", "mlp_pre.0"]
    with pytest.raises(OutOfRange):
        uh.load("random/llama").resolve("blocks.9.mlp.hook_pre")
