"""What users import: names, signatures, and help that reads like documentation."""
import importlib
import inspect

import pytest
import torch
from conftest import ROOT

import jat_nb
from jat_nb.attacks import ATTACKS, double_pass
from jat_nb.models import create

MODULES = sorted(".".join(p.relative_to(ROOT / "jat_nb").with_suffix("").parts)
                 for p in (ROOT / "jat_nb").rglob("*.py") if not p.stem.startswith("_"))
PROMISED = {
    "warp": "warp affine_flow rigid_flow l2inf_norm generalized_sign project_disc random_disc",
    "losses": "correct cross_entropy soft_cross_entropy kl_divergence margin_loss dlr_loss targeted_dlr_loss "
              "random_target most_confusing_target bilateral_labels uniform_labels smooth_labels",
    "randomness": "seed_from image_generators uniform",
    "threats": "Pixel Flow Affine apply_chain contains_chain",
    "data": "ImageSet Unlabelled few_labels load available DATASETS default_budget",
    "readers": "picture_files read_picture",
    "batches": "Batch Stream batches pairs num_batches shares",
    "augmentations": "crop_flip random_crop_flip resized_crop_flip random_resized_crop_flip random_cutout cutout "
                     "AUGMENTATIONS",
    "models": "Logits NormalizedModel create frozen unwrap bare plain_state",
    "weights": "start_from tensor_hash read_tensors save_weights load_weights pretrained zoo open_weights",
    "backbones": "SmallCNN PreActBlock PreActResNet PaddedBlock PaddedResNet resnet32_cifar wide_resnet "
                 "resnet18_cifar",
    "records": "Record write_json append_jsonl environment progress",
    "pictures": "show_images show_attack flow_to_rgb quiver budget_strip ssim similarity",
    "ascent": "Adversarial ascend plan",
    "attacks": "Adversarial ascend chain fgsm pgd mi_fgsm ggsm one_pass cascade double_pass Named",
    "risks": "Risks risks",
    "minimum_norm": "THRESHOLDS distance at_threshold Nearest nearest ddn cw_l2 jsma pointwise",
    "flow_layers": "Squeeze ActNorm InvertibleConv AffineCoupling Split",
    "glow": "dequantise Glow round_trip_error",
    "unseen": "Elastic elastic JPEG jpeg Gabor gabor unseen_attacks avg_accuracy",
    "weather": "Fog fog Snow snow",
    "explain": "smooth_grad saliency gallery grad_cam cam_entropy overlay",
    "corruptions": "CORRUPTIONS available_corruptions corrupt cifar10_c corruption_accuracy corruption_score",
    "joint_space": "Latent om_pgd jsa counted_codes latent_report",
    "rigid": "Rigid search rigid_grid rand_adv grid_adv worst_of_k rigid pgd_plus grid_plus",
    "objectives": "natural adversarial jat average maximum WithMemory roles networks in_form OBJECTIVES OWN_LOSS "
                  "likelihood",
    "mixing": "Partners partners mix mixed_loss mixup robust_mixup attack_then_mix iat mart",
    "augmenting": "LatentBall randomized_la adversarial_la AuxiliaryNorms advprop VaeGan OfClass vae_gan "
                  "judge_vae_gan by_class",
    "perceptual": "stages perceptual perceptual_distance fast_lpa fast_pat layer_moves rlat",
    "semi_supervised": "srt klr trades guessed rst uat",
    "papers.srt_claims": "CLAIMS PAPER",
    "papers.srt_studies": "DISTANCES distances",
    "papers.srt": "RECIPES ROWS COLUMNS OWN_SUITES SYNONYMS NUMBERS HOMES LAMBDAS FRACTIONS",
    "pareto": "Pareto Weights solve_weights moments disagreement effective_r feasible_r pareto_front dominates "
              "hypervolume knee universal_score",
    "recipes": "Recipe bind",
    "schedules": "learning_rate make_optimizer",
    "processes": "Processes processes total",
    "updates": "OnEpoch train_step accuracy judge_classifier Judge Memory",
    "training": "fit",
    "catalogue": "Row Paper Tier TIER Setting papers register recipe recipes adapt setting listing",
    "papers.jat": "PAPER RECIPES ROWS COLUMNS SYNONYMS OWN_SUITES CLAIMS",
    "checkpoints": "publish best_row probe_curve overfitting_gap",
    "contract": "Promise check_attack",
    "autoattack": "autoattack",
    "masking": "random_pixels random_flow transfer steps_curve budget_surface local_linearity masking_report",
    "suites": "SUITES KINDS Suite Kind Job suites networks_of run_suite check_answer attacks_from",
    "differences": "Share difference Finding comparisons verdict bits",
    "results": "Run read_runs published survivors",
    "tables": "printed_numbers paper_table side_by_side recipe_names",
    "claims": "Check Claim Evidence judge_claims findings_table",
    "reports": "QUESTIONS masking_checks html_report",
    "plots": "attack_bars training_curve budget_curves",
    "timing": "Rounds spread interleave slope step_cost PLANS",
    "bench": "MEASUREMENTS",
    "bench_report": "main",
    "cli": "jat_train jat_eval jat_attack jat_report main",
    "shell": "command",
    "own_pictures": "attack_options outcome",
    "judging": "adopt run_facts unfinished open_run judge",
    "gan": "Generator Discriminator train_gan",
    "generators": "Projection project LatentSet Projected robust_mixup_codes",
    "evaluation": "counted wilson_interval Evaluation evaluate budget_curve clean pgd_at ggsm_at joint_at "
                  "raw_accuracy",
    "demo": "Settings run_demo main",
    "fronts": "clipping front_table plot_front export_point",
    "papers.ijsat": "RECIPES ROWS OWN_SUITES SIX SEVEN AVERAGE_OF_SIX SCORES COLUMNS SYNONYMS CORRECTIONS make_gan "
                    "make_drawn averaged corrupted",
    "papers.ijsat_claims": "CLAIMS PAPER",
    "papers.pareto": "NUMBERS RECIPES PRINTED HEADLINE ROWS OWN_SUITES COLUMNS Numbers",
    "papers.pareto_claims": "CLAIMS PAPER",
    "papers.pareto_scores": "SYNONYMS CORRECTIONS PLAIN_UNIVERSAL SCORES universal sacrificed",
    "papers.pareto_studies": "TAUS stored_maps centres displacements",
    "spatial": "grid_to_px affine integrated displacement_frequency flow_loss smooth_flow",
}


def test_every_module_promises_something():
    assert set(PROMISED) == set(MODULES)


@pytest.mark.parametrize("module", sorted(PROMISED))
def test_promised_names(module):
    missing = set(PROMISED[module].split()) - set(importlib.import_module(f"jat_nb.{module}").__all__)
    assert not missing


def test_version_only():
    assert jat_nb.__version__ and not [n for n in vars(jat_nb) if not n.startswith("__") and n in ("double_pass", "ascend")]
    assert (ROOT / "jat_nb" / "py.typed").exists()


def test_signature_of_double_pass():
    parameters = inspect.signature(double_pass).parameters
    defaults = dict(eps_pixel=8 / 255, eps_flow=0.3, step_pixel=2 / 255, step_flow=0.15, steps=20, order="spatial-pixel",
                    target=None, random_start=True, restarts=1, keep_best=False, generator=None, return_info=False)
    assert list(parameters)[:3] == ["model", "x", "y"]
    for name, value in defaults.items():
        assert parameters[name].default == value and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attacks_share_one_shape(name):
    parameters = list(inspect.signature(ATTACKS[name]).parameters.values())
    assert [p.name for p in parameters[:3]] == ["model", "x", "y"]
    assert {"loss", "target", "generator", "return_info"} <= {p.name for p in parameters}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[3:])
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented(module):
    package = importlib.import_module(f"jat_nb.{module}")
    for name in getattr(package, "__all__", []):
        thing = getattr(package, name)
        if inspect.isfunction(thing) or (inspect.isclass(thing) and thing.__module__ == package.__name__):
            assert (thing.__doc__ or "").strip(), f"{module}.{name}"


def test_the_ten_line_example():
    model, x, y = create("wrn_10_1_cifar"), torch.rand(2, 3, 32, 32), torch.tensor([3, 5])
    x_adv = double_pass(model, x, y, steps=2)
    assert x_adv.shape == x.shape and 0 <= x_adv.min() and x_adv.max() <= 1 and not x_adv.requires_grad


def test_no_name_means_two_things():
    seen, twice = {}, []
    for name in (n for n in MODULES if not n.startswith("papers.")):  # each paper has the same tables
        module = importlib.import_module(f"jat_nb.{name}")
        for public in module.__all__:
            meant = seen.setdefault(public, getattr(module, public))
            if meant is not getattr(module, public): twice.append(public)
    assert set(twice) <= {"main"}  # a command of each module
