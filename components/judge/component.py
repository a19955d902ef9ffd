"""Judge: the present champion on the same data as the candidates."""

from kfp import dsl

from components import JUDGE


@dsl.component(base_image=JUDGE, install_kfp_package=False)
def judge(data: str, fingerprint: str, num_beams: int, limit: int, clip: str, output: str) -> str:
    """Return the URI of the champion's evaluation under `output`, or none if there is no champion yet."""
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.candidates import require_same_data
    from model_lib.steps.judging import judge_champion
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        require_same_data(data, fingerprint)
        options = {"num_beams": num_beams, "limit": limit, "clip": clip or None}
        return judge_champion(data, output, tracking_from_environment(), **options)
