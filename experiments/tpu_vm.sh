#!/usr/bin/env bash
# Takes the workbook to Google Cloud TPU VMs: from nothing to a training run. Prints the commands,
# one a line, as they can be pasted into a shell; --go executes them.
#
#   experiments/tpu_vm.sh create    ask for a slice; make the bucket that holds the run folder
#   experiments/tpu_vm.sh status    state of the request, of the slice and of each worker
#   experiments/tpu_vm.sh setup     on every worker: code, Python 3.11, the bucket, the environment
#   experiments/tpu_vm.sh collect   on worker 0: notebook 02_datasets, into the run folder
#   experiments/tpu_vm.sh run       on every worker: notebook 04_training, detached
#   experiments/tpu_vm.sh logs      follow worker 0's log
#   experiments/tpu_vm.sh stop      interrupt what collect or run started
#   experiments/tpu_vm.sh lab       JupyterLab on a slice of one worker, at localhost:8888 here
#   experiments/tpu_vm.sh fetch     results, figures, notebooks and metrics to experiments/runs
#   experiments/tpu_vm.sh delete    give the slice back; the bucket stays
#
# Everything may be repeated. After a preemption: delete, create, setup, and the same run.
#
#   --zone ZONE        where, e.g. us-west4-a (needed)
#   --bucket BUCKET    name of the bucket (PROJECT-gato-REGION; needed without --project)
#   --project PROJECT  (default: gcloud's own)
#   --name NAME        of the slice (gato)
#   --type TYPE        accelerator type (v5litepod-8); v3-512 is the paper's slice of 16 x 16 chips
#   --version VERSION  TPU software (by type)
#   --preset PRESET    a file in experiments/params (accelerator)
#   --repo URL         clone this on the workers (default: copy this working tree)
#   --spot             ask for a slice that may be preempted
#   --go               execute, not only print
#
# Each of these with a value can be set as a variable too: --zone is GATO_TPU_ZONE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec 3<&0 # gcloud may ask questions

die() { printf '%s\n' "tpu_vm: $*" >&2; exit 1; }
refuse() { printf '%s\n' "tpu_vm: $*" >&2; exit 2; }
note() { printf '# %s\n' "$*"; }

actions="create status setup collect run logs stop lab fetch delete"
options="--zone --bucket --project --name --type --version --preset --repo --spot --go"
action='' go='' spot=''
zone=${GATO_TPU_ZONE:-} bucket=${GATO_TPU_BUCKET:-} project=${GATO_TPU_PROJECT:-}
name=${GATO_TPU_NAME:-gato} type=${GATO_TPU_TYPE:-v5litepod-8} version=${GATO_TPU_VERSION:-}
preset=${GATO_TPU_PRESET:-accelerator} repo=${GATO_TPU_REPO:-}

# --- options ------------------------------------------------------------------------------------

while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' experiments/tpu_vm.sh
      exit ;;
    --go) go=1 ;;
    --spot) spot=--spot ;;
    --zone | --bucket | --project | --name | --type | --version | --preset | --repo)
      [[ $# -gt 1 && $2 != --* ]] || refuse "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift ;;
    --zone=* | --bucket=* | --project=* | --name=* | --type=* | --version=* | --preset=* | --repo=*)
      option=${1%%=*}
      printf -v "${option#--}" '%s' "${1#*=}" ;;
    -*) refuse "unknown option '$1'; known: $options" ;;
    *)
      [[ -z $action ]] || refuse "one subcommand at a time, not $action and $1"
      action=$1 ;;
  esac
  shift
done

# matches OPTION VALUE PATTERN EXPECTED
matches() { [[ $2 =~ ^$3$ ]] || refuse "$1: expected $4, got '$2'"; }

[[ -n $action ]] || refuse "which subcommand? known: $actions"
[[ " $actions " == *" $action "* ]] || refuse "unknown subcommand '$action'; known: $actions"

# One worker is one VM: 8 cores (4 chips) up to v5p; 1, 4 or 8 chips of v5e and v6e where they are
# the whole slice, 4 chips in larger ones.
number=${type##*-}
if [[ $type =~ ^(v2|v3|v4|v5p)-[1-9][0-9]{0,4}$ ]] && ((number % 8 == 0)); then
  workers=$((number / 8))
elif [[ $type =~ ^(v5litepod|v6e)-(1|4|8|16|32|64|128|256)$ ]]; then
  workers=$((number <= 8 ? 1 : number / 4))
else
  refuse "unknown type '$type'; known: v2-N, v3-N, v4-N, v5p-N (N cores, a multiple of 8)," \
    "v5litepod-N, v6e-N (N chips: 1, 4, 8, 16, 32, 64, 128 or 256)"
fi
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

[[ -z $project ]] || matches --project "$project" '[a-z][a-z0-9:.-]*[a-z0-9]' "a project's id"
[[ -n $zone ]] || refuse "--zone is needed, e.g. --zone us-west4-a"
matches --zone "$zone" '[a-z]+(-[a-z]+)+[0-9]+-[a-z0-9]+' "a zone such as us-west4-a"
region=${zone%-*}
bucket=${bucket#gs://}
bucket=${bucket:-${project:+$project-gato-$region}}
[[ -n $bucket ]] || refuse "--bucket or --project is needed"
matches --bucket "$bucket" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' "a bucket's name"
matches --name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "small letters, digits and hyphens"
matches --version "$version" '[a-z0-9][a-z0-9._-]*' "a TPU software version"
[[ -z $repo ]] || matches --repo "$repo" '[A-Za-z0-9][^[:space:]]*' "a URL that git can clone"
presets=$(cd experiments/params && echo *.yaml)
[[ $preset =~ ^[A-Za-z0-9_-]+$ && -f experiments/params/$preset.yaml ]] ||
  refuse "unknown preset '$preset'; known: ${presets//.yaml/}"
[[ $action != lab || $workers == 1 ]] ||
  refuse "lab needs a slice of one worker, and $type has $workers"
[[ -z $go ]] || command -v gcloud >/dev/null ||
  refuse "--go needs gcloud: see https://cloud.google.com/sdk/docs/install, then gcloud auth login"

# --- printing and executing ---------------------------------------------------------------------

apostrophe="'"
newline=$'\n'

# A word as one types it in a shell.
quoted() {
  local escaped="'\\''"
  case $1 in
    '' | *[!a-zA-Z0-9_@%+=:,./-]*) printf "'%s'" "${1//$apostrophe/$escaped}" ;;
    *) printf '%s' "$1" ;;
  esac
}

shown() {
  local word line=
  for word; do
    case $word in
      --*=*) line="$line ${word%%=*}=$(quoted "${word#*=}")" ;;
      *) line="$line $(quoted "$word")" ;;
    esac
  done
  printf '%s' "${line# }"
}

step() {
  printf '%s\n' "$(shown "$@")"
  [[ -n $go ]] || return 0
  "$@" <&3 || die "that failed with status $?; when it is mended, repeat '$action'"
}

# unless CHECK... -- MAKE...
unless() {
  local check=()
  while [[ $1 != -- ]]; do
    check+=("$1")
    shift
  done
  shift
  printf '%s >/dev/null 2>&1 || %s\n' "$(shown "${check[@]}")" "$(shown "$@")"
  [[ -n $go ]] || return 0
  "${check[@]}" >/dev/null 2>&1 <&3 || "$@" <&3 ||
    die "that failed with status $?; when it is mended, repeat '$action'"
}

where=(--zone="$zone" ${project:+--project="$project"})

# remote WORKER COMMAND [GCLOUD FLAGS]
remote() {
  local worker=$1 command=$2
  shift 2
  step gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$worker" \
    --command="$command" "$@"
}

# on WORKER VARIABLE...: runs the script on standard input there, after setting these variables.
# It is sent as one line, so its statements end in semicolons.
on() {
  local worker=$1 script variable given=
  shift
  IFS= read -r -d '' script || true
  for variable; do given="$given$variable=$(quoted "${!variable}"); "; done
  script=${script%"$newline"}
  remote "$worker" "$given${script//$newline/ }"
}

# --- what runs on the workers -------------------------------------------------------------------

# A new VM may still be at its own updates. The Ubuntu of the TPU software has no Python 3.11, and
# an image may come with a gcsfuse that cannot rename folders.
install_packages() {
  on all <<'END'
set -euo pipefail;
again() {
for pause in 15 15 30 30 60 60 0; do if "$@"; then return; fi; sleep $pause; done; return 1; };
python3.11 -c "import ensurepip, venv" 2>/dev/null ||
again sudo add-apt-repository -y ppa:deadsnakes/ppa;
source=https://packages.cloud.google.com/apt;
key=/usr/share/keyrings/cloud.google.asc;
curl -fsSL $source/doc/apt-key.gpg | sudo tee $key >/dev/null;
echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null;
again sudo apt-get -q update;
again sudo DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends
git make python3.11 python3.11-venv gcsfuse libegl1 libegl-mesa0 libgl1-mesa-dri;
END
}

copy_code() {
  if [[ -n $repo ]]; then
    on all repo <<'END'
if [ -d gato/.git ]; then git -C gato pull --ff-only "$repo"; else git clone "$repo" gato; fi
END
    return
  fi
  step cd "$PWD"
  step mkdir -p experiments/runs
  step env COPYFILE_DISABLE=1 tar -czf experiments/runs/gato.tgz --exclude=./.venv \
    --exclude=./.conda --exclude=./experiments/runs --exclude=__pycache__ \
    --exclude=.ipynb_checkpoints .
  step gcloud compute tpus tpu-vm scp experiments/runs/gato.tgz "$name:gato.tgz" "${where[@]}" \
    --worker=all
  remote all 'mkdir -p gato && tar -xzf gato.tgz -C gato && rm gato.tgz'
}

# Metadata must not be cached: what one worker has written, the others read at once. On large TPU
# VMs gcsfuse would keep it forever.
mount_bucket() {
  on all bucket <<'END'
set -euo pipefail;
runs=$HOME/runs/$bucket;
mkdir -p "$runs";
mountpoint -q "$runs" ||
gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "$runs" || true;
probe=$runs/.probe-$(hostname);
if mountpoint -q "$runs" && touch "$probe" && rm "$probe";
then echo "$(hostname): $runs is mounted"; exit; fi;
instance=http://metadata.google.internal/computeMetadata/v1/instance;
account=$(curl -sf -H "Metadata-Flavor: Google" $instance/service-accounts/default/email ||
echo ACCOUNT);
echo "$(hostname): cannot write to gs://$bucket; please run:
gcloud storage buckets add-iam-policy-binding gs://$bucket
--member=serviceAccount:$account --role=roles/storage.objectUser" >&2;
exit 1;
END
}

# The lock is held for as long as the program runs.
begin() {
  cat <<'END'
set -euo pipefail;
runs=$HOME/runs/$bucket;
cd "$HOME/gato";
mountpoint -q "$runs" || { echo "$(hostname): $runs is not mounted; repeat setup" >&2; exit 1; };
exec 9>"$HOME/gato.lock";
flock -n 9 || { echo "$(hostname): busy; see logs, or stop it first" >&2; exit 1; };
export PYTHONUNBUFFERED=1 JUPYTER_PREFER_ENV_PATH=1;
END
}

# Which worker this is, and who the others are: an old "name:number:address, ...", or host names.
join_others() {
  cat <<'END'
attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes;
worker=$(curl -sSf -H "Metadata-Flavor: Google" $attributes/agent-worker-number);
others=$(curl -sSf -H "Metadata-Flavor: Google" $attributes/worker-network-endpoints);
count=$(($(echo "$others" | tr -cd , | wc -c) + 1));
[ "$count" -eq "$workers" ] ||
{ echo "$(hostname): the slice has $count workers, not $workers: check --type" >&2; exit 1; };
first=${others%%,*};
export JAX_COORDINATOR_ADDRESS=${first##*:}:8476 JAX_NUM_PROCESSES=$workers JAX_PROCESS_ID=$worker;
END
}

# start NOTEBOOK [--distributed]. A mistake shows within seconds; after that the log tells.
start() {
  cat <<END
nohup .venv/bin/python experiments/run.py --preset "\$preset" --notebook $1 --runs "\$runs"${2:+ $2}
>>"\$HOME/gato.log" 2>&1 </dev/null &
END
  cat <<'END'
pid=$!;
echo $pid >"$HOME/gato.pid";
for second in 1 2 3 4 5; do sleep 1; kill -0 $pid 2>/dev/null || break; done;
if kill -0 $pid 2>/dev/null; then echo "$(hostname): running; its log is gato.log"; exit; fi;
status=0;
wait $pid || status=$?;
tail -n 5 "$HOME/gato.log";
exit $status;
END
}

# --- subcommands --------------------------------------------------------------------------------

[[ -n $go ]] || note "dry run; workers of $type: $workers; --go executes this:"
((workers == 1)) || [[ $action == create || $action == fetch || $action == delete ]] ||
  note "gcloud reaches several workers through ssh-agent: ssh-add ~/.ssh/google_compute_engine"

case $action in
  create)
    step gcloud services enable compute.googleapis.com storage.googleapis.com tpu.googleapis.com \
      ${project:+--project="$project"}
    # Folders that can be renamed in one step; deleted checkpoints are not kept for a week.
    unless gcloud storage buckets describe "gs://$bucket" ${project:+--project="$project"} -- \
      gcloud storage buckets create "gs://$bucket" --location="$region" \
      --uniform-bucket-level-access --enable-hierarchical-namespace --soft-delete-duration=0 \
      ${project:+--project="$project"}
    unless gcloud compute tpus queued-resources describe "$name" "${where[@]}" -- \
      gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$version" ${spot:+"$spot"}
    step gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)'
    note "setup is possible once this is ACTIVE; if it is FAILED or SUSPENDED, delete and create" ;;
  status)
    step gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)'
    step gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
      --format='yaml(state,health,acceleratorType)'
    on all <<'END'
if flock -n "$HOME/gato.lock" true; then state=idle; else state=running; fi;
echo "$(hostname): $state; $(tail -n 1 "$HOME/gato.log" 2>/dev/null)"
END
    ;;
  setup)
    install_packages
    copy_code
    mount_bucket
    remote all 'cd gato && EXTRAS=tpu make setup USE_CONDA=0' ;;
  collect) # JAX on the TPU of one worker would wait for the others
    on 0 bucket preset < <(begin; echo 'export JAX_PLATFORMS=cpu;'; start 02_datasets)
    note "logs follows it" ;;
  run)
    if ((workers == 1)); then
      on all bucket preset < <(begin; start 04_training)
    else
      on all bucket preset workers < <(begin; join_others; start 04_training --distributed)
    fi
    note "logs follows worker 0; when this is interrupted, the same command goes on" ;;
  logs)
    remote 0 'tail -n 50 -F gato.log' --ssh-flag=-t ;;
  stop)
    on all <<'END'
if flock -n "$HOME/gato.lock" true; then echo "$(hostname): nothing to stop"; exit; fi;
kill -INT "$(cat "$HOME/gato.pid")" && echo "$(hostname): stopping"
END
    ;;
  lab) # the port must be the one that is forwarded, and no browser opens over there
    note "open the address that it prints"
    remote 0 'cd gato && BROWSER=true JUPYTER_PORT_RETRIES=0 EXTRAS=tpu make lab USE_CONDA=0' \
      --ssh-flag=-t --ssh-flag='-L 8888:localhost:8888' --ssh-flag='-o ExitOnForwardFailure=yes' ;;
  fetch) # neither demonstrations nor checkpoints; without state/ nothing here counts as finished
    step cd "$PWD"
    step mkdir -p "experiments/runs/$preset"
    step gcloud storage rsync --recursive --exclude='(data|state)/|.*/steps/' \
      "gs://$bucket/$preset" "experiments/runs/$preset" ;;
  delete)
    step gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
    note "the bucket stays; this would remove it, with every run in it:"
    note "gcloud storage rm --recursive gs://$bucket${project:+ --project=$project}" ;;
esac
