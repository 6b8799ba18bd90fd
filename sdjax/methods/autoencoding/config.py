"""The fields of a recipe that trains an autoencoder."""

from __future__ import annotations

import dataclasses

from sdjax.methods.method import MethodConfig
from sdjax.models.critics.patchgan import PatchGANConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(MethodConfig):
    """Training of the VAE. A step is one of the autoencoder and then one of the critic."""

    name: str = "autoencoder"
    loss: str = "l1"  # "l1" or "l2" of each pixel
    reduction: str = "mean"  # over pixels, or "sum" as in latent diffusion, where the KL is smaller
    kl_weight: float = 1e-6  # times KL(q(z|x) || N(0, 1)), summed over the latent
    logvar: float = 0.0  # the error is divided by exp(logvar); see learn_logvar
    learn_logvar: bool = False  # logvar is trained, from this value
    lpips_weight: float = 0.0  # of LPIPS beside the loss of a pixel; 0 for none
    lpips_from: str = ""  # a file with the weights of VGG16, for LPIPS
    critic_weight: float = 0.0  # of the PatchGAN critic, times the adaptive weight; 0 for none
    critic_loss: str = "hinge"  # or "vanilla"
    critic_width: int = 64  # channels of its first layer
    critic_layers: int = 3  # that halve the picture: with 3, it judges patches of 70 pixels
    critic_rate: float = 1.0  # its learning rate, in those of `optim`
    critic_start: int = 0  # the first step that trains it
    critic_loss_start: int = 0  # the first step at which it counts for the autoencoder
    decoder_only: bool = False  # the encoder stays as it was loaded, and so do all latents
    equivariance: float = 0.0  # share of batches whose latents are scaled and turned (EQ-VAE: 0.5)
    smaller_pictures: float = 0.0  # share of the others whose pictures are made smaller (0.25)
    equivariance_scales: tuple[float, ...] = (0.25, 0.5, 0.75)  # a program is compiled for each

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss", ("l1", "l2")), ("reduction", ("mean", "sum")),
            ("critic_loss", ("hinge", "vanilla")),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise ValueError(f"method.{name} is {value!r}; expected {expected}")
        for name in ("kl_weight", "lpips_weight", "critic_weight", "critic_start"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"method.{name} is {value}; expected 0 or more")
        if self.critic_rate <= 0:
            raise ValueError(f"method.critic_rate is {self.critic_rate}; expected more than 0")
        if self.critic_loss_start < self.critic_start:
            raise ValueError(
                f"method.critic_loss_start is {self.critic_loss_start}, before critic_start = "
                f"{self.critic_start}; expected that step or a later one: an untrained critic "
                "teaches nothing"
            )
        for name in ("equivariance", "smaller_pictures"):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"method.{name} is {value}; expected 0 to 1")
        if not all(0.0 < scale < 1.0 for scale in self.equivariance_scales):
            raise ValueError(
                f"method.equivariance_scales is {self.equivariance_scales}; expected numbers "
                "between 0 and 1"
            )
        if self.changes_pictures and not self.equivariance_scales:
            raise ValueError("method.equivariance_scales is empty; expected one scale or more")
        if self.decoder_only and self.equivariance:
            raise ValueError(
                "method.equivariance changes the latents, which method.decoder_only keeps; "
                "expected one of them"
            )
        _ = self.critic  # whose own fields are checked

    @property
    def changes_pictures(self) -> bool:
        """Whether some batches are scaled."""
        return bool(self.equivariance or self.smaller_pictures)

    @property
    def critic(self) -> PatchGANConfig:
        """The shape of the critic."""
        try:
            return PatchGANConfig(width=self.critic_width, layers=self.critic_layers)
        except ValueError as error:
            raise ValueError(f"method.critic_{error}") from error
