"""The learning algorithms. A user-defined trainer is any class with the methods of Trainer, named by `_target_`."""

from ami_trainer.trainers.forward_dynamics import ForwardDynamicsTrainer
from ami_trainer.trainers.image_vae import ImageVAETrainer
from ami_trainer.trainers.inverse_dynamics import InverseDynamicsTrainer
from ami_trainer.trainers.ppo import PPOTrainer
from ami_trainer.trainers.random_features import RandomFeaturesTrainer

__all__ = [
    "ForwardDynamicsTrainer",
    "ImageVAETrainer",
    "InverseDynamicsTrainer",
    "PPOTrainer",
    "RandomFeaturesTrainer",
]
