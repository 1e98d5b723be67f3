"""The cells of the page "In Your Training Loop", run on other data and held to formulas written without `rkd`."""

import copy
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch import nn

PAGE = Path(__file__).resolve().parent.parent / "book" / "attachments" / "training-loop.ipynb"
EXTRA = "needs the extra rkd[integrations]"


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Runs the page's cells that define these names, and gives their scope; nothing is fetched, sent or left behind."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    sources = [cell.source for cell in nbformat.read(PAGE, as_version=4).cells if cell.cell_type == "code"]

    def define(*names):
        scope = {}
        for name in names:
            (source,) = [x for x in sources if f"def {name}(" in x or f"class {name}(" in x]
            exec(compile(source, PAGE.name, "exec"), scope)
        return scope

    yield define
    assert not list(tmp_path.iterdir())


def networks():
    teacher = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    return teacher, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data():
    return list(zip(torch.randn(24, 4).split(8), torch.randint(3, (24,)).split(8)))


def by_hand(student, teacher, batches, temperature, beta, lr):
    """Hinton's distillation with Adam, as PyTorch alone writes it."""
    teacher.eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    for inputs, labels in batches:
        p = (teacher(inputs).detach() / temperature).softmax(-1)
        log_q = (student(inputs) / temperature).log_softmax(-1)
        soft = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
        loss = (1 - beta) * F.cross_entropy(student(inputs), labels) + beta * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_same_weights(ours, theirs, **tolerance):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


class TestPlainLoop:
    def test_trains_as_written_by_hand(self, page):
        scope, batches = page("distil"), data()
        teacher, student = networks()
        other, frozen = copy.deepcopy(student), copy.deepcopy(teacher)
        teacher.train()
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
        loss = scope["DistillationLoss"](alpha=1.0, temperature=3.0, beta=0.7)
        for _ in range(3):
            values = scope["distil"](student, teacher, batches, loss, optimizer)
        by_hand(other, frozen, 3 * batches, 3.0, 0.7, 0.01)
        assert len(values) == 3
        assert_same_weights(student, other, rtol=1e-4, atol=1e-5)
        assert_same_weights(teacher, frozen, rtol=0, atol=0)
        assert all(x.grad is None for x in teacher.parameters())


class TestLightning:
    @pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
    @pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
    @pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
    def test_trains_as_written_by_hand(self, page):
        lightning = pytest.importorskip("lightning", reason=EXTRA)
        scope, batches = page("distil", "Distillation"), data()
        teacher, student = networks()
        other, frozen = copy.deepcopy(student), copy.deepcopy(teacher)
        loss = scope["DistillationLoss"](alpha=1.0, temperature=3.0, beta=0.7)
        module = scope["Distillation"](student, teacher.train(), loss, lr=0.01)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        by_hand(other, frozen, 3 * batches, 3.0, 0.7, 0.01)
        assert_same_weights(student, other, rtol=1e-4, atol=1e-5)
        assert_same_weights(teacher, frozen, rtol=0, atol=0)


class TestHuggingFaceTrainer:
    @pytest.fixture
    def scope(self, page):
        pytest.importorskip("transformers", reason=EXTRA)
        pytest.importorskip("accelerate", reason=EXTRA)
        torch.manual_seed(0)
        return page("distil", "summed_over_tokens", "DistillationTrainer", "language_model", "padded")

    def trainer(self, scope, student, teacher, sequences, divergence, tmp_path, **options):
        from transformers import PrinterCallback, TrainingArguments

        quiet = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "use_cpu": True}
        steps = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
        arguments = TrainingArguments(str(tmp_path), lr_scheduler_type="constant", **quiet, **steps, **options)
        options = {"train_dataset": sequences, "teacher": teacher, "divergence": divergence}
        trainer = scope["DistillationTrainer"](student, arguments, **options)
        trainer.remove_callback(PrinterCallback)
        return trainer

    @staticmethod
    def batch(sequences):
        return {key: torch.stack([x[key] for x in sequences]) for key in sequences[0]}

    @staticmethod
    def mean_by_hand(student, teacher, batch, temperature, beta):
        """From all logits: position i against token i + 1, padding left out, mean over the tokens that count."""
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
        z, v = student(**tokens).logits[:, :-1], teacher(**tokens).logits.detach()[:, :-1]
        labels = batch["labels"][:, 1:]
        kept = labels != -100
        log_q, p = (z[kept] / temperature).log_softmax(-1), (v[kept] / temperature).softmax(-1)
        soft = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
        return (1 - beta) * F.cross_entropy(z[kept], labels[kept]) + beta * soft

    def test_loss_and_gradients_are_those_of_all_logits(self, scope, tmp_path):
        student, teacher = scope["language_model"](16), scope["language_model"](32)
        sequences = scope["padded"](4, 9, 6, 11)
        batch, other = self.batch(sequences), copy.deepcopy(student)
        divergence = {"alpha": 1.0, "temperature": 2.0, "beta": 0.7}
        loss = self.trainer(scope, student, teacher, sequences, divergence, tmp_path).compute_loss(student, batch)
        loss.backward()
        expected = self.mean_by_hand(other, teacher.eval(), batch, 2.0, 0.7)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for a, b in zip(student.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)

    def test_without_soft_targets_it_is_the_model_s_own_loss(self, scope, tmp_path):
        student = scope["language_model"](16)
        sequences = scope["padded"](4, 9, 6, 11)
        trainer = self.trainer(scope, student, scope["language_model"](16), sequences, {"beta": 0.0}, tmp_path)
        batch = self.batch(sequences)
        torch.testing.assert_close(trainer.compute_loss(student, batch), student(**batch).loss, rtol=1e-5, atol=0)

    def test_accumulated_steps_are_one_step(self, scope, tmp_path):
        """Batches with 6 and 62 tokens that count: a mean of means would weigh the short sequences ten times."""
        first, teacher = scope["language_model"](16), scope["language_model"](32)
        lengths = (2, 3, 2, 3, 14, 18, 16, 18)
        sequences = scope["padded"](*lengths)
        order = {"train_sampling_strategy": "sequential"}
        trained = []
        for size, accumulated in ((8, 1), (4, 2), (2, 4)):
            student = copy.deepcopy(first)
            options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, **order}
            divergence = {"alpha": 2.0, "temperature": 2.0, "beta": 0.7}
            self.trainer(scope, student, teacher, sequences, divergence, tmp_path, **options).train()
            trained.append(student)
        for student in trained[1:]:
            assert_same_weights(student, trained[0], rtol=1e-4, atol=1e-6)
        halves = [self.batch(x) for x in (sequences[:4], sequences[4:], sequences)]
        losses = [self.mean_by_hand(first, teacher, x, 2.0, 0.7).item() for x in halves]
        assert abs((losses[0] + losses[1]) / 2 - losses[2]) > 0.01 * losses[2]
        assert max((a - b).abs().max() for a, b in zip(first.parameters(), trained[0].parameters())) > 1e-3
