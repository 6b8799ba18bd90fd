"""Published shapes, each as its `config.json` has it. The defaults of the classes are SD1.5's."""

from sdjax.models.clip import CLIPTextConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.vae import VAEConfig

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

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
UNET_SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,  # CLIP-L's 768 and OpenCLIP-bigG's 1280
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,  # 1280 + 6 x 256
)
# stabilityai/stable-diffusion-xl-refiner-1.0
UNET_SDXL_REFINER = UNetConfig(
    sample_size=128,
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,  # OpenCLIP-bigG alone
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,  # 1280 + 5 x 256
)
# text_encoder_2/config.json of both: OpenCLIP ViT-bigG/14 with its projection. text_encoder/ of the
# base is CLIP-L, as in SD1.
CLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
# vae/config.json of both. Its activations overflow float16, which is what `force_upcast` tells the
# pipelines of diffusers; sdjax computes in float32 or bfloat16, which has float32's range.
VAE_SDXL = VAEConfig(sample_size=1024, scaling_factor=0.13025)
