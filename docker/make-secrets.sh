#!/bin/sh
# Creates the secrets that docker-compose.yml mounts, in docker/secrets or the folder that is named:
# a password of the database, the database's address with it, the token of the Ray cluster, and a
# certificate for TLS that this machine has signed itself: put your own in its place, tls_certificate
# and tls_key. What exists is left as it is.
#
# Compose mounts these files as they lie here, owner and mode included, and the containers run as
# users that this machine does not know. Hence the files can be read by anyone who reaches them, and
# the folder, which no container sees, keeps everyone but its owner from reaching them.
set -eu
umask 077

folder=${1:-$(dirname -- "$0")/secrets}
mkdir -p -- "$folder"
chmod 700 -- "$folder"

random_hex() { # 256 bits
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

keep() { # NAME: standard input as a new file, whole or not at all
    if [ -e "$folder/$1" ]; then
        echo "kept     $folder/$1" >&2
        return
    fi
    cat >"$folder/.$1.new"
    chmod 444 -- "$folder/.$1.new"
    mv -- "$folder/.$1.new" "$folder/$1"
    echo "created  $folder/$1" >&2
}

if [ -e "$folder/EINSUM_NAS_DATABASE_URL" ] && [ ! -e "$folder/postgres_password" ]; then
    echo "error: $folder has EINSUM_NAS_DATABASE_URL and no postgres_password;" \
        "accepted: both, which hold one password, or none" >&2
    exit 2
fi
random_hex | keep postgres_password
password=$(cat -- "$folder/postgres_password")
printf 'postgresql://einsum_nas:%s@postgres/einsum_nas' "$password" | keep EINSUM_NAS_DATABASE_URL
random_hex | keep ray_token

for pair in "tls_certificate tls_key" "tls_key tls_certificate"; do
    if [ -e "$folder/${pair% *}" ] && [ ! -e "$folder/${pair#* }" ]; then
        echo "error: $folder has ${pair% *} and no ${pair#* }; accepted: both, of one pair, or none" >&2
        exit 2
    fi
done
if [ ! -e "$folder/tls_key" ]; then
    names=subjectAltName=DNS:localhost,IP:127.0.0.1
    made=$(openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 825 \
        -subj /CN=localhost -addext "$names" -keyout - 2>/dev/null)
    printf '%s\n' "$made" | openssl x509 | keep tls_certificate
    printf '%s\n' "$made" | openssl pkey | keep tls_key
else
    keep tls_certificate </dev/null
    keep tls_key </dev/null
fi
