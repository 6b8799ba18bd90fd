"""Published shapes, each as its `config.json` has it. The defaults of the classes are SD1.5's."""

from sdjax.models.clip import CLIPTextConfig
from sdjax.models.unet import UNetConfig

# stabilityai/stable-diffusion-2-1-base, unet/config.json
UNET_SD2 = UNetConfig(
    attention_head_dim=(5, 10, 20, 20),  # heads per level, each of 64 channels
    cross_attention_dim=1024,
    use_linear_projection=True,
)
# stabilityai/stable-diffusion-2-1: 768 px
UNET_SD2_V = UNetConfig(
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    sample_size=96,
    upcast_attention=True,
    use_linear_projection=True,
)
# text_encoder/config.json of both: OpenCLIP ViT-H/14 without its last layer
CLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
