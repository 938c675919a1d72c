"""What the towers promise: causality, masks, and one vector per content whatever the batch around it."""

import itertools

import numpy as np
import pytest
import torch
from fakes import TINY, tiny_config, tiny_items, tiny_model

from pixrec.artifact import load_model, save_model
from pixrec.model import towers
from pixrec.model.backbone import Backbone
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content
from pixrec.model.towers import length_groups, tokens_of

INTERLEAVED = tiny_config(model={"user_tower": "interleaved"})
MEAN = tiny_config(model={"user_tower": "interleaved", "user_pooling": "mean"})
LAST = tiny_config(model={"user_tower": "interleaved", "pooling": "last", "instruction": "<s>Square Tile:"})
COMPACT = tiny_config(model={"user_tower": "compact"})


@pytest.fixture(params=[INTERLEAVED, MEAN, LAST, COMPACT], ids=["separator", "mean", "last", "compact"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def catalog(model):
    return Catalog(tiny_items(with_pictures=[0, 1, 2, 3, 4, 5]), model.encoder)


def test_vectors_are_unit_and_of_the_promised_shape(model, catalog):
    embedder = model.embedder()
    items = embedder.items(catalog, np.arange(len(catalog)))
    users = embedder.users(catalog, [np.array([1, 2]), np.array([3])], items)
    assert items.shape == (12, TINY.model.embedding_width)
    assert users.shape == (2, TINY.model.embedding_width)
    assert np.linalg.norm(items, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(users, axis=1) == pytest.approx(1, abs=1e-5)


def test_company_in_the_batch_changes_no_vector(model, catalog):
    """Padding never enters a mean, whatever is longer beside it."""
    embedder = model.embedder()
    items = embedder.items(catalog, np.arange(12))
    histories = [np.array([1]), np.array([7, 0, 3, 2]), np.array([8, 9])]
    together = embedder.users(catalog, histories, items)
    alone = np.concatenate([embedder.users(catalog, [h], items) for h in histories])
    assert together == pytest.approx(alone, abs=1e-5)
    assert items[8] == pytest.approx(embedder.items(catalog, np.array([8]))[0], abs=1e-5)


def test_a_prefix_does_not_see_its_future(model, catalog):
    """v_U of a prefix inside a sequence is v_U of that prefix as a history of its own."""
    history = np.array([1, 7, 4, 2, 9])
    _, items, sequences = catalog.histories([history])
    embedder = model.embedder()
    vectors = embedder.items(catalog, np.arange(12))
    prefixes = embedder.users(catalog, [history[:n] for n in range(1, 5)], vectors)
    with torch.no_grad():
        if model.tower.compact is None:
            user = model.tower(items, sequences, generate=False).user
        else:
            user = model.tower.compact.user_vectors(torch.from_numpy(vectors[history])[None])[0, :4]
    assert user.numpy() == pytest.approx(prefixes, abs=1e-5)
    assert items.token_ids.shape[0] == len(set(history.tolist()))


def test_the_last_token_speaks_for_an_item_and_an_instruction_comes_first(tmp_path):
    """Against the states of sequences written by hand; within a history an item is what stands before its separator."""
    model = tiny_model(LAST)
    catalog, tower, tokenizer = Catalog(tiny_items(), model.encoder), model.tower, model.encoder.tokenizer
    instruction = tokenizer("<s>Square Tile:", add_special_tokens=False)["input_ids"]
    assert instruction[0] == tokenizer.bos_token_id
    assert tower.backbone.instruction.tolist() == instruction
    tower.eval()

    def project(encoded, at):
        ids = torch.tensor([instruction + encoded.token_ids[0].tolist()])
        slots = torch.cat([torch.full((1, len(instruction)), -1), encoded.picture_slot[:1]], 1)
        plain = Backbone(tower.backbone.model, [0.5] * 3, [0.5] * 3)
        states = plain.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool), slots, pictures)
        return torch.nn.functional.normalize(tower.item_proj(states[0, len(instruction) + at]), dim=-1)

    with torch.no_grad():
        items = catalog.items(np.array([3]))
        pictures = tower.pictures(items)
        assert torch.allclose(tower.item_vectors(items)[0], project(items, items.token_ids.shape[1] - 1), atol=1e-5)
        _, items, histories = catalog.histories([np.array([5, 3])])
        pictures = tower.pictures(items)
        found = tower(items, histories, generate=False).target_given_user[0]
        assert torch.allclose(found, project(histories, int(histories.separator_at[0, 1]) - 1), atol=1e-5)
    save_model(str(tmp_path / "model"), model, {})
    again, rows = load_model(str(tmp_path / "model")).embedder(), np.arange(12)
    assert again.items(catalog, rows) == pytest.approx(model.embedder().items(catalog, rows), abs=1e-6)


def test_only_the_last_events_are_read(model, catalog):
    embedder = model.embedder()
    vectors = embedder.items(catalog, np.arange(12))
    recent = np.arange(embedder.max_history_items)
    long = np.concatenate([[11, 10], recent])
    assert embedder.users(catalog, [long], vectors) == pytest.approx(embedder.users(catalog, [recent], vectors))


@pytest.mark.parametrize(
    ("modality", "changed", "unchanged"), [("text", "text", "pixels"), ("image", "pixels", "text")]
)
def test_a_knockout_does_not_see_what_it_must_not(modality, changed, unchanged):
    model = tiny_model(tiny_config(model={"modalities": modality}))
    pictures = [np.full((32, 32, 3), value, np.uint8) for value in (10, 240)]
    base = {"text": "Square", "pixels": pictures[0]}
    other = {"text": "Tile", "pixels": pictures[1]}
    vector = model.embedder().contents
    first = vector([Content(**base)])
    assert vector([Content(**{**base, unchanged: other[unchanged]})]) == pytest.approx(first)
    assert np.abs(vector([Content(**{**base, changed: other[changed]})]) - first).max() > 1e-3


def test_an_item_of_which_nothing_is_known_still_has_a_vector(model):
    assert np.isfinite(model.embedder().contents([Content("", None)])).all()


def test_targets_are_the_next_items():
    model = tiny_model(INTERLEAVED)
    catalog = Catalog(tiny_items(), model.encoder)
    distinct, items, sequences = catalog.histories([np.array([5, 3, 5]), np.array([2, 9])])
    out = model.tower(items, sequences, generate=True)
    assert distinct[out.target.numpy()].tolist() == [3, 5, 9]
    assert out.target_given_user.shape == out.user.shape
    texts = [len(model.encoder.tokenize([catalog.table.text(row)])[0]) for row in (3, 5, 9)]
    assert len(out.text_ids) == sum(texts)
    assert out.text_logits.shape[0] == sum(texts)
    first = model.encoder.tokenize([catalog.table.text(3)])[0]
    assert out.text_ids[: texts[0]].tolist() == first.tolist()


def test_generation_never_sees_the_token_it_must_name():
    """Changing a target's text must not change the scores of its first text token."""
    model = tiny_model(INTERLEAVED)
    encoder = model.encoder
    model.tower.eval()
    logits = []
    for text in ("Square", "Patch"):
        items = encoder.items([Content("Tile", None), Content(text, None)])
        with torch.no_grad():
            logits.append(
                model.tower(items, encoder.histories(items, [np.array([0, 1])]), generate=True).text_logits[0]
            )
    assert torch.allclose(*logits, atol=1e-6)


def test_the_trained_parameters_are_exactly_these():
    from pixrec.training.interleaved import choose_trainable

    def trained(**sections):
        model = tiny_model(tiny_config(**sections))
        choose_trainable(model.tower, model.config)
        return {name for name, p in model.tower.named_parameters() if p.requires_grad}

    everything = {n for n, _ in tiny_model().tower.named_parameters()}
    vision = {n for n in everything if ".vision_model." in n or ".connector." in n}
    heads = {n for n in everything if not n.startswith("backbone.")}
    assert trained() == everything
    assert trained(train={"learnable_temperature": False}) == everything - {"log_temperature"}
    assert trained(model={"modalities": "text"}) == everything - vision
    assert trained(model={"freeze_vision": True}) == everything - vision

    def adapters(pattern):
        lora = tiny_model(tiny_config(model={"lora": {"enabled": True}})).tower
        return {n for n, _ in lora.named_parameters() if "lora_" in n and pattern in n}

    assert len(adapters("text_model")) == 4 * 2  # one layer, four targets, A and B
    assert trained(model={"lora": {"enabled": True}}) == adapters("") | heads
    assert trained(model={"lora": {"enabled": True}, "freeze_vision": True}) == adapters("text_model") | heads


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft about transformers
def test_adapters_load_in_plain_peft(tmp_path):
    """A saved adapter, read by peft alone on top of the same base weights, gives the same logits."""
    from peft import PeftModel

    from pixrec.artifact import save_model

    config = tiny_config(model={"lora": {"enabled": True, "rank": 2}})
    model = tiny_model(config)
    with torch.no_grad():
        for name, parameter in model.tower.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_model(str(tmp_path), model, {})
    base = tiny_model(TINY).tower.backbone  # the same seed gives the same base
    ids = torch.arange(7, 13).unsqueeze(0)
    with torch.no_grad():
        ours = model.tower.backbone.model.eval()(input_ids=ids).logits
        before = base.model.eval()(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base.model, str(tmp_path / "adapter")).eval()(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)


def test_rows_of_like_length_are_computed_together(monkeypatch):
    """Little padding, and the loss and gradients of one pass."""
    monkeypatch.setattr(towers, "PASS_TOKENS", 8)
    groups = length_groups(np.array([10, 3, 9, 12, 4, 3]))
    assert [rows.tolist() for rows in groups] == [[3, 0, 2], [4, 1, 5]]
    assert tokens_of(torch.tensor([10, 3, 9, 12, 4, 3])) == (41, 3 * 12 + 3 * 4)
    assert [rows.tolist() for rows in length_groups(np.array([7, 7]))] == [[0, 1]]

    items = tiny_items(with_pictures=range(6))
    model = tiny_model(INTERLEAVED, items)
    histories = [np.array([0, 7, 3, 5]), np.array([8, 10]), np.array([1, 2, 9]), np.array([11])]
    _, batch, sequences = Catalog(items, model.encoder).histories(histories)
    assert len(length_groups(batch.length.numpy())) > 1
    assert len(length_groups(sequences.length.numpy())) > 1

    def trained(by_length):
        model.tower.by_length = by_length
        model.tower.zero_grad()
        out = model.tower(batch, sequences, generate=True)
        loss = out.text_logits.square().mean() + (out.user @ out.item.T).exp().sum() + out.target_given_user.sum()
        loss.backward()
        return float(loss.detach()), torch.cat(
            [p.grad.flatten() for p in model.tower.parameters() if p.grad is not None]
        )

    (one, gradient), (other, plain) = trained(True), trained(False)
    assert one == pytest.approx(other, rel=1e-5)
    assert float((gradient - plain).norm() / plain.norm()) < 1e-4


def test_rows_are_parted_so_that_least_is_computed(monkeypatch):
    """Beside every way to cut the rows, sorted by length."""
    monkeypatch.setattr(towers, "PASS_TOKENS", 8)
    rng = np.random.default_rng(0)
    for lengths in (rng.integers(1, 30, size) for size in (1, 2, 3, 5, 7, 8) for _ in range(5)):
        falling, cuts = np.sort(lengths)[::-1], range(1, len(lengths))
        ways = [np.split(falling, some) for n in range(len(lengths)) for some in itertools.combinations(cuts, n)]
        least = min(sum(part.size * part.max() + 8 for part in parts) for parts in ways)
        groups = length_groups(lengths)
        assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
        assert sum(len(rows) * lengths[rows].max() + 8 for rows in groups) == least
    monkeypatch.setattr(towers, "PASS_TOKENS", 10**9)
    assert len(length_groups(np.arange(1, 40))) == 1


def test_places_of_examples_and_of_text_are_those_of_the_masks():
    items = tiny_items(with_pictures=range(6))
    _, _, sequences = Catalog(items, tiny_model(items=items).encoder).histories([np.array([0, 7, 3]), np.array([8])])
    has_next = torch.zeros_like(sequences.item, dtype=torch.bool)
    has_next[:, :-1] = sequences.item[:, 1:] >= 0
    assert sequences.example.tolist() == torch.nonzero(has_next.flatten()).flatten().tolist()
    assert sequences.text.tolist() == torch.nonzero(sequences.target_text.flatten()).flatten().tolist()
    assert sequences.target.tolist() == sequences.item[:, 1:][sequences.item[:, 1:] >= 0].tolist()
    moved = sequences.to("meta")
    assert moved.text.is_meta
    assert moved.length.device.type == "cpu", "by it is chosen what is computed together"


def test_vectors_in_bf16_lie_close_and_are_float32():
    items = tiny_items(with_pictures=range(6))
    model = tiny_model(INTERLEAVED, items)
    catalog, rows, histories = Catalog(items, model.encoder), np.arange(12), [np.array([0, 7, 3]), np.array([8])]
    whole, half = model.embedder(), model.embedder()
    half.precision = "bf16"
    for one, other in (
        (whole.items(catalog, rows), half.items(catalog, rows)),
        (whole.users(catalog, histories, None), half.users(catalog, histories, None)),
    ):
        assert other.dtype == np.float32
        assert not np.array_equal(one, other)
        assert (one * other).sum(1).min() > 0.999
