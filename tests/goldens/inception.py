"""Asks torch-fidelity for the features, FID and KID that tests/models/test_inception.py expects: `python -m
tests.goldens.inception` where `pip install torch-fidelity` was run; whenever the embedded photographs change."""

import json
import tempfile
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from tests.models.test_inception import COUNT, GOLDEN, KEPT, photographs, random_weights


def main() -> None:
    weights = {key: torch.tensor(value) for key, value in random_weights().items()}
    counts = {key.replace("running_var", "num_batches_tracked"): torch.tensor(0) for key in weights if "_var" in key}
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights | counts, file.name)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file.name)
    with torch.no_grad():
        (features,) = network(torch.tensor(photographs().transpose(0, 3, 1, 2)))
    first, others = features.double().split(COUNT // 2)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (first, others)), verbose=False)
    kid = kid_features_to_metric(first, others, kid_subsets=1, kid_subset_size=COUNT // 2, verbose=False)
    answers = {
        "features": [[round(value, 6) for value in row] for row in features[:, :KEPT].tolist()],
        "fid": fid["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
    }
    Path(GOLDEN).write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
