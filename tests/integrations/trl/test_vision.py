"""The fused loss of a model that sees images: TRL's own loss, with the pixels on their way to the body."""

import pytest
import torch
import transformers

IMAGE, START, END = 98, 99, 100


@pytest.fixture
def folder(tmp_path):
    """A tiny Qwen2-VL."""
    text = {
        "vocab_size": 104, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 95, "eos_token_id": 96, "bos_token_id": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 2,
        "spatial_merge_size": 1,
    }
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(1)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def with_images(batch):
    """The batch with an image of 2 x 2 patches in the prompt of every row."""
    place = torch.tensor([[START, IMAGE, IMAGE, IMAGE, IMAGE, END]]).expand(4, -1)
    prompts = torch.cat([batch["prompt_ids"], place], 1)
    mask = torch.cat([batch["prompt_mask"], torch.ones_like(place)], 1)
    completion = torch.zeros_like(batch["completion_ids"])
    kinds = torch.cat([(prompts == IMAGE).long(), completion], 1)
    images = {"image_grid_thw": torch.tensor([[1, 2, 2]] * 4), "num_images": [1] * 4, "mm_token_type_ids": kinds}
    return batch | images | {"prompt_ids": prompts, "prompt_mask": mask, "pixel_values": torch.randn(16, 3 * 2 * 2 * 2)}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_fused_is_unfused_with_images(alpha, folder, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(fused_loss=True, ace_alpha=alpha, model=folder, beta=0.05)
    batch = with_images(a_batch(trainer))
    fused = loss_and_gradients(trainer, dict(batch))
    unfused = loss_and_gradients(make_trainer(ace_alpha=alpha, model=folder, beta=0.05), dict(batch))
    torch.testing.assert_close(fused[0], unfused[0], rtol=1e-6, atol=1e-6)
    for name, gradient in unfused[1].items():
        torch.testing.assert_close(fused[1][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max(), msg=name)
    assert any("visual" in name for name in fused[1])
    dark = loss_and_gradients(trainer, batch | {"pixel_values": torch.zeros(16, 24)})
    assert not torch.isclose(dark[0], fused[0])
