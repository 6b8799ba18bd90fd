"""Small CLIPs of transformers with random weights, as folders."""

import json

from sdjax.data.text.tokenizer import Tokenizer

WORDS = ["a red circle", "a photo of a cat", "two blue squares and a green star"]
CASES = {
    "quick_gelu": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-4},
}


def make_folder(folder, hidden_act, layer_norm_eps):
    """A small CLIPModel as the hub has it, every parameter random; (folder, model)."""
    import torch
    import transformers

    tokenizer = Tokenizer.train(WORDS * 4, 560, context_length=12)
    tokenizer.save(folder)
    same = {
        "hidden_act": hidden_act,
        "layer_norm_eps": layer_norm_eps,
        "num_attention_heads": 3,
        "projection_dim": 7,  # of no use: the one of the whole model counts
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **same,
                "vocab_size": tokenizer.vocab_size,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "max_position_embeddings": 12,
                "eos_token_id": tokenizer.eos_id,
                "bos_token_id": tokenizer.bos_id,
                "pad_token_id": tokenizer.pad_id,
            },
            vision_config={
                **same,
                "hidden_size": 30,
                "intermediate_size": 44,
                "num_hidden_layers": 3,
                "image_size": 32,
                "patch_size": 9,  # 3 x 3 patches, and a rest that nobody looks at
            },
            projection_dim=20,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                parameter.fill_(3.3)
            elif "norm" in name or "layrnorm" in name or name.endswith("bias"):
                parameter.copy_(0.3 * noise + float(name.endswith("weight")))
            elif parameter.ndim > 1 and "embedding.weight" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise)
    model.save_pretrained(folder)
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**processor).save_pretrained(folder)
    return folder, model


def pillow_pixels(folder, images):
    """[B, 3, H, W] of transformers' CLIPImageProcessor on Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    return processor([*images], return_tensors="pt").pixel_values


def copy(folder, target, **changes):
    """The folder again, with other content for some of its files; None leaves a file out."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, content in changes.items():
        file = target / name.replace("__", ".")
        file.unlink() if content is None else file.write_text(json.dumps(content))
    return target
