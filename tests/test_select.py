"""What every selection promises, whatever it looks at."""

from functools import partial

import pytest
import torch

import vtc.cover as cover
import vtc.merge as merge
import vtc.methods.groups as groups
import vtc.select as select
from vtc.choice import Choice, Seen
from vtc.observe import TokenStates

FEATURES, TOKENS, IMAGES = TokenStates(0), 30, 3


def quota(scores, seen, keep):
    """Quotas over groups, which come as a row of their own, and over the shares of their best tokens."""
    group = seen[GROUP][:, 0].long()
    shares = groups.means(scores.exp(), group, seen.valid, 5)
    base, first = groups.by_shares(shares / shares.sum(1, keepdim=True), keep)
    return groups.quota(scores, seen, keep, group, base, first)


GROUP = TokenStates(1)
GREEDY = {
    "top k": select.top_k,
    "farthest": partial(cover.farthest, of=FEATURES),
    "farthest, alone": partial(cover.farthest, of=FEATURES, power=0.0, alone=True),
    "facility": partial(cover.facility, of=FEATURES),
    "dpp": partial(cover.dpp, of=FEATURES),
    "quota": quota,
}
FEW = select.preferring(lambda seen: seen.index % 3 == 0, GREEDY["farthest"])
ALL = GREEDY | {"grid": select.grid, "top k of each grid": select.top_k_each, "few first": FEW}

every = pytest.mark.parametrize("name", ALL)
seeds = pytest.mark.parametrize("seed", range(4))


def drawn(seed, ragged=True):
    """Scores, what was seen, and how many are to stay; images of different sizes, with holes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(IMAGES, 12, TOKENS, generator=generator) + 1
    features[:, :, 2] -= 2  # one token is far from all, and no pair of tokens are each other's farthest nearest
    group = torch.randint(0, 5, (IMAGES, 1, TOKENS), generator=generator).float()
    valid = torch.ones(IMAGES, TOKENS, dtype=torch.bool)
    if ragged:
        valid[0, -6:], valid[1] = False, torch.rand(TOKENS, generator=generator) > 0.3
        valid[1, 2] = True
    parts = [[(4, 6)], [(5, 6)], [(3, 6), (2, 6)]] if ragged else [[(5, 6)]] * IMAGES
    index = torch.arange(TOKENS).expand(IMAGES, -1)
    scores = torch.rand(IMAGES, TOKENS, generator=generator)
    keep = (valid.sum(1) * torch.rand(IMAGES, generator=generator)).long()
    return scores, Seen({FEATURES: features, GROUP: group}, valid, index, parts), keep


def changed(seen, **rows):
    return Seen({**seen.rows, **rows.get("rows", {})}, rows.get("valid", seen.valid), seen.index, seen.parts)


@every
@seeds
def test_exactly_so_many_that_can_be_seen(name, seed):
    scores, seen, keep = drawn(seed)
    for count in (keep, torch.zeros_like(keep), torch.ones_like(keep), seen.valid.sum(1) - 1):
        kept = ALL[name](scores, seen, count).keep
        assert kept.dtype == torch.bool
        assert kept.sum(1).tolist() == count.tolist()
        assert not (kept & ~seen.valid).any()


@every
@seeds
def test_all_of_them_are_all_of_them(name, seed):
    scores, seen, _ = drawn(seed)
    assert torch.equal(ALL[name](scores, seen, seen.valid.sum(1)).keep, seen.valid)


@every
def test_so_many_also_of_what_is_no_number(name):
    scores, seen, keep = drawn(0)
    rows = {FEATURES: torch.full_like(seen[FEATURES], torch.nan)}
    assert ALL[name](scores * torch.nan, changed(seen, rows=rows), keep).keep.sum(1).tolist() == keep.tolist()


@pytest.mark.parametrize("name", GREEDY)
@seeds
def test_a_permutation_of_the_tokens_permutes_what_stays(name, seed):
    scores, seen, keep = drawn(seed)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    rows = {need: row[..., order] for need, row in seen.rows.items()}
    kept = GREEDY[name](scores, seen, keep).keep
    mixed = GREEDY[name](scores[:, order], changed(seen, rows=rows, valid=seen.valid[:, order]), keep).keep
    assert torch.equal(mixed, kept[:, order])


@every
@seeds
def test_the_scale_of_the_features_does_not_matter(name, seed):
    scores, seen, keep = drawn(seed)
    kept = ALL[name](scores, seen, keep).keep
    for factor in (1e-3, 7.0, 1e4):
        assert torch.equal(ALL[name](scores, changed(seen, rows={FEATURES: factor * seen[FEATURES]}), keep).keep, kept)


@seeds
@pytest.mark.parametrize("relevance", [1e-6, 1.0, 1e4])
def test_dpp_is_the_greedy_determinant_whatever_the_relevance(relevance, seed):
    """Of tokens that are all relevant alike, against determinants in double precision."""

    def volume(kernel, chosen):
        return round(float(kernel[chosen][:, chosen].det().log()), 9)

    _, seen, _ = drawn(seed, ragged=False)
    alike, kept = torch.nn.functional.normalize(seen[FEATURES].double(), dim=1), []
    for x in alike:
        kernel, chosen = x.T @ x, []
        for _ in range(9):
            others = [j for j in range(TOKENS) if j not in chosen]
            chosen.append(max(others, key=lambda j: (volume(kernel, [*chosen, j]), -j)))
        kept.append(sorted(chosen))
    ours = GREEDY["dpp"](torch.full((IMAGES, TOKENS), relevance), seen, torch.full((IMAGES,), 9)).keep
    assert [image.nonzero()[:, 0].tolist() for image in ours] == kept


@every
@seeds
def test_what_is_hidden_does_not_matter(name, seed):
    """Whatever stands there, also what is no number."""
    scores, seen, keep = drawn(seed)
    kept = ALL[name](scores, seen, keep).keep
    features = seen[FEATURES].masked_fill(~seen.valid[:, None], torch.nan)
    hidden = scores.masked_fill(~seen.valid, 5.0)
    assert torch.equal(ALL[name](hidden, changed(seen, rows={FEATURES: features}), keep).keep, kept)


@every
@seeds
def test_a_ragged_batch_is_each_image_alone(name, seed):
    scores, seen, keep = drawn(seed)
    kept = ALL[name](scores, seen, keep).keep
    for image in range(IMAGES):
        one, length = slice(image, image + 1), sum(h * w for h, w in seen.parts[image])
        rows = {need: row[one, :, :length] for need, row in seen.rows.items()}
        alone = Seen(rows, seen.valid[one, :length], seen.index[one, :length], seen.parts[one])
        assert torch.equal(ALL[name](scores[one, :length], alone, keep[one]).keep[0], kept[image, :length])


@pytest.mark.parametrize("name", [name for name in GREEDY if name != "quota"])
def test_the_earlier_of_equals_wins(name):
    """All tokens twice, the second time in the same order: of a pair the second one is never alone."""
    scores, seen, _ = drawn(0, ragged=False)
    rows = {need: row.repeat(1, 1, 2) for need, row in seen.rows.items()}
    valid = torch.ones(IMAGES, 2 * TOKENS, dtype=torch.bool)
    twice = Seen(rows, valid, torch.arange(2 * TOKENS).expand(IMAGES, -1), [[(10, 6)]] * IMAGES)
    first, second = GREEDY[name](scores.repeat(1, 2), twice, torch.full((IMAGES,), 9)).keep.chunk(2, dim=1)
    assert not (second & ~first).any()
    assert first.any()


@seeds
def test_groups_do_not_depend_on_the_batch_nor_on_what_is_hidden(seed):
    _, seen, _ = drawn(seed)
    hidden = seen[FEATURES].masked_fill(~seen.valid[:, None], torch.nan)
    group = groups.k_means(hidden, seen.valid, 5)
    loading = groups.components(hidden, seen.valid, 8).abs()
    for image in range(IMAGES):
        shown = seen.valid[image]
        alone, everyone = seen[FEATURES][image : image + 1, :, shown], torch.ones(1, int(shown.sum()), dtype=torch.bool)
        assert torch.equal(groups.k_means(alone, everyone, 5)[0], group[image, shown])
        torch.testing.assert_close(groups.components(alone, everyone, 8).abs()[0], loading[image, shown])
        assert not loading[image, ~shown].any()


@seeds
def test_components_are_those_of_a_full_decomposition(seed):
    """Of an image that is larger than the space that is searched, with a spectrum as images have it."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, 201) ** -0.7
    features = torch.randn(1, 300, 200, generator=generator) * scale @ torch.randn(200, 200, generator=generator)
    found = groups.components(features, torch.ones(1, 200, dtype=torch.bool), 6)[0]
    exact = torch.linalg.svd(features[0] - features[0].mean(0), full_matrices=False).Vh[:6].T
    torch.testing.assert_close(found.abs(), exact.abs(), atol=1e-3, rtol=0)


def test_fewer_tokens_than_groups():
    features, valid = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4).bool()
    valid[1, 1:] = False
    assert groups.k_means(features, valid, 9).max() < 4
    loading = groups.components(features, valid, 9)
    assert loading.shape == (2, 4, 9)
    assert not loading[..., 4:].any()
    assert loading.isfinite().all()


@seeds
def test_suppression_is_that_of_a_loop(seed):
    scores, seen, _ = drawn(seed)
    scores[:, ::3] = scores[:, :1]  # ties
    near = torch.rand(IMAGES, TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed)) > 0.8
    rivals = near | near.transpose(1, 2)
    stands = groups.unsuppressed(scores, seen.valid, rivals)
    for image in range(IMAGES):
        expected = []
        for token in sorted(seen.valid[image].nonzero()[:, 0].tolist(), key=lambda j: (-scores[image, j], j)):
            if not any(rivals[image, token, other] for other in expected):
                expected.append(token)
        assert stands[image].nonzero()[:, 0].tolist() == sorted(expected)


@seeds
def test_what_is_preferred_is_chosen_as_if_alone_and_the_best_of_the_others_fill_up(seed):
    """Of images in which every third token is preferred: those are merged, and the others are not."""
    scores, seen, _ = drawn(seed)

    def halves(scores, seen, keep):
        keep = select.top_k(scores, seen, keep).keep
        place = torch.arange(TOKENS).expand_as(scores)
        into = place.where(keep, scores.masked_fill(~keep, -torch.inf).argmax(1, keepdim=True))
        return Choice(keep, into.masked_fill(~seen.valid, -1), weight=merge.sizes(into).clamp(min=1))

    for count in (4, 12):
        choice = select.preferring(lambda seen: seen.index % 3 == 0, halves)(scores, seen, torch.full((IMAGES,), count))
        for image in range(IMAGES):
            order = sorted(range(TOKENS), key=lambda j: -scores[image, j])
            first = [j for j in order if seen.valid[image, j] and j % 3 == 0]
            others = [j for j in order if seen.valid[image, j] and j % 3]
            kept, more = first[:count], others[: max(0, count - len(first))]
            assert choice.keep[image].nonzero()[:, 0].tolist() == sorted(kept + more)
            into = {j: j for j in kept + more} | dict.fromkeys(first[count:], kept[0])
            assert choice.into[image].tolist() == [into.get(j, -1) for j in range(TOKENS)]
            assert all(choice.weight[image, j] == 1 for j in more)
